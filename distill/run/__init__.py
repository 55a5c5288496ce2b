"""A run folder on disk: its records, what makes them valid, and how files are written."""
