"""Exact steps on parts of tensors: which part a rank holds, which blocks it shares, and with whom."""

from .manager import Shards, Stepping

__all__ = ["Shards", "Stepping"]
