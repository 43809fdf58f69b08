"""Optimizers of other authors as arms of the ablation: a registry, and adapters to the trainer (docs/rivals.md)."""

from .registry import RIVALS
from .rival import Rival, Setup
from .size import StateSize, state_size

__all__ = ["RIVALS", "Rival", "Setup", "StateSize", "state_size"]
