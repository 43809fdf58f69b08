"""The step as one pass over memory, for dense CPU tensors."""

from .library import available
from .step import accepts, describe, step

__all__ = ["accepts", "available", "describe", "step"]
