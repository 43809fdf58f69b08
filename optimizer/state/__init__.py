"""The state of each parameter, and how it is written to checkpoints and loaded from them."""
