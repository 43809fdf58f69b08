"""The engines, which are implementations of one step, and the dispatch that chooses an engine for each tensor.

The eager engine (``optimizer.step.update``) steps one tensor at a time, and ``rounded`` does so for quantised first
moments and rounded bf16 parameters. ``foreach`` steps lists of tensors. ``native`` steps CPU tensors in one pass over
memory, and ``triton`` steps CUDA tensors. ``traced`` is for autograd and graph capture. ``compiled`` is the operator
that ``torch.compile`` sees, which dispatches to the same engines.
"""

from .compiled import register, traced_step
from .dispatch import PLACES, SEEDS, Engines, seed_of

__all__ = ["PLACES", "SEEDS", "Engines", "register", "seed_of", "traced_step"]
