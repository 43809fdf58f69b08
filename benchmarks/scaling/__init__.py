"""Bytes that the optimizer sends per step: simulated for large models, and counted for small ones."""
