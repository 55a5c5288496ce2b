"""What a run is on a machine: its folder and records, what makes them valid, files, progress, threads."""
