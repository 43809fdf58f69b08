"""The native loop: the step of CPU tensors in C++, in one pass over memory."""

from .library import available
from .step import Batches, Ready, dense_gradient, obstacle, prepare
from .ways import TRIALS, Chooser

__all__ = ["TRIALS", "Batches", "Chooser", "Ready", "available", "dense_gradient", "obstacle", "prepare"]
