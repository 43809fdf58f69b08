"""The step as one pass over memory, for dense CPU tensors."""

from .library import available
from .step import Batches, Ready, accepts, describe, prepare

__all__ = ["Batches", "Ready", "accepts", "available", "describe", "prepare"]
