"""What is in a model: predictions by layer, what states hold and for how long, and whether a model knows a board."""
