"""The native loop: the step of CPU tensors in C++, in one pass over memory."""

from .library import available
from .step import Batches, Ready, dense_gradient, obstacle, prepare

__all__ = ["Batches", "Ready", "available", "dense_gradient", "obstacle", "prepare"]
