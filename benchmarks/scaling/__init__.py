"""What the optimizer itself sends per step, on paper for large models and counted for small ones."""
