"""The pipeline, from a recipe to a student that others load, and its command line."""
