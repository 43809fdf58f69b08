"""How many of transformers' architectures the partition knows, and how many of those gradients prove."""
