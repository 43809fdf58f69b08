"""Gradient checkpointing: keep a block's input instead of its activations, and compute them again when needed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def through(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """Return ``block(x)``; with ``recompute``, its backward pass runs the block again, with the same bits."""
    if not recompute:
        return block(x)
    result: Tensor = checkpoint(block, x, use_reentrant=False)
    return result
