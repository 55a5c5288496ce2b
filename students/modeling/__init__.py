"""All that travels with a checkpoint, flat: torch, transformers and the kernels' references are all it needs."""
