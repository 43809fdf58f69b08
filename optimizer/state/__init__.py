"""What the optimizer keeps for each parameter, and how that is read from and written to checkpoints."""
