"""Controls for the ablation."""

from .permuted import PermutedAdamMini

__all__ = ["PermutedAdamMini"]
