"""Controls for the ablation, and variants that are only worth studying."""

from .permuted import PermutedAdamMini
from .statistics import STATISTICS, StatisticAdamMini

__all__ = ["STATISTICS", "PermutedAdamMini", "StatisticAdamMini"]
