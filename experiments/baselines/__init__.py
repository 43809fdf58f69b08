"""Rivals and controls the ablation compares with."""

from .permuted import PermutedAdamMini

__all__ = ["PermutedAdamMini"]
