"""Exact steps on parts of tensors: which part a rank holds, which blocks it shares, and with whom."""

from .consolidated import full_state_dict, load_full_state_dict
from .manager import Shards
from .stepping import Stepping

__all__ = ["Shards", "Stepping", "full_state_dict", "load_full_state_dict"]
