"""Which layers keep attention: what stands in for those that do not, how well the model still does, the search."""
