"""Exact steps of sharded tensors: which boxes a rank stores, and which blocks it shares with which ranks."""

from .manager import Shards
from .step_view import StepView
from .whole_state import full_state_dict, load_full_state_dict

__all__ = ["Shards", "StepView", "full_state_dict", "load_full_state_dict"]
