"""Adam-mini with another statistic of a block than the mean of its second moments, for studies only.

The mean over a block of moving averages is the moving average of the mean, so Adam-mini needs one scalar per block.
Every other statistic here needs the second moment of every element, as much memory as AdamW's. The study asks whether
it would be worth having.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .permuted import PermutedAdamMini

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda v: v.mean(1),
    "max": lambda v: v.amax(1),
    "min": lambda v: v.amin(1),
    "median": lambda v: v.median(1).values,
    "geometric": lambda v: v.log().mean(1).exp(),
    "jensen": lambda v: v.rsqrt().mean(1).pow(-2),
}
"""Statistics of second moments [blocks, elements of a block] -> [blocks]. "jensen" gives a block the mean of the step
sizes 1 / sqrt(v) that its elements would have under AdamW. "median" is the lower one of two middle values."""


class StatisticAdamMini(PermutedAdamMini):
    """Adam-mini's update with a chosen statistic of the elements' second moments in each block.

    Args:
        model: the model; the parameter groups are those of ``AdamMini(model)``.
        statistic: a key of ``STATISTICS``.
        lr: learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        weight_decay: decoupled weight decay, for weights of two and more dimensions.
        rules: rule set of the blocks.

    Raises:
        ValueError: the statistic is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        statistic: str,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        weight_decay: float = 0.0,
        rules: str = "adam_mini",
    ) -> None:
        if statistic not in STATISTICS:
            raise ValueError(f"statistic={statistic!r} is unknown; choose from {sorted(STATISTICS)}")
        super().__init__(model, lr, betas, weight_decay=weight_decay, rules=rules, seed=None)
        self._statistic = STATISTICS[statistic]
        self._blocks: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def second_moments(self, state: dict[str, Tensor], squares: Tensor, ids: Tensor, weight: float) -> Tensor:
        """Update the second moment of every element; return the statistic of each block."""
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(squares)
        v = state["exp_avg_sq"].lerp_(squares, weight)
        out = torch.empty(int(ids.max()) + 1, dtype=v.dtype)
        for blocks, elements in self._by_size(ids):
            out[blocks] = self._statistic(v[elements])
        return out

    def _by_size(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, for each size of blocks, their numbers [k] and the indices of their elements [k, size]."""
        if id(ids) not in self._blocks:
            sizes, order = torch.bincount(ids), ids.argsort(stable=True)
            starts = sizes.cumsum(0) - sizes
            self._blocks[id(ids)] = []
            for size in sizes.unique().tolist():
                blocks = (sizes == size).nonzero().flatten()
                self._blocks[id(ids)].append((blocks, order[starts[blocks, None] + torch.arange(size)]))
        return self._blocks[id(ids)]
