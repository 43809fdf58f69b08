"""The step as one pass over memory, for CPU tensors."""

from .library import available
from .step import Batches, Ready, obstacle, prepare

__all__ = ["Batches", "Ready", "available", "obstacle", "prepare"]
