"""Count the architectures of transformers that the partition recognises, and those that gradients verify."""
