"""Exact steps on parts of tensors: which box a rank holds, which blocks it shares, and with whom."""

from .manager import Shards
from .step_view import StepView
from .whole_state import full_state_dict, load_full_state_dict

__all__ = ["Shards", "StepView", "full_state_dict", "load_full_state_dict"]
