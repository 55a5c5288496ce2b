"""What a model is worth: held-out quality, answers, cost."""
