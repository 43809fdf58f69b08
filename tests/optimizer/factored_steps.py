"""Steps of tensors with a factored second moment: the reference, part by part, and fresh state."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from optimizer.partition import FactoredLayout
from optimizer.partition.roles import viewed
from optimizer.step.reference import FactoredState, factored_reference_step, initial_factored_state


class Reference:
    """The reference, part by part, of any factored layout."""

    def __init__(self, p: Tensor, layout: FactoredLayout) -> None:
        self.layout, self.shape, self.p = layout, tuple(p.shape), p.clone()
        self.states = [initial_factored_state(matrix) for matrix, _ in self._matrices(self.p)]

    def _matrices(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every part as a matrix [rows, columns], with the index of its elements in the flattened tensor."""
        ids = torch.arange(x.numel()).reshape(viewed(self.shape, self.layout.fold))
        leads = prod(self.layout.leading)
        ids = ids.movedim(self.layout.axis, len(self.layout.leading))
        ids = ids.reshape(leads, ids.shape[len(self.layout.leading)], -1)
        parts = self.layout.part_of_row()
        for lead in ids:
            for part in range(self.layout.parts):
                index = lead[parts == part]
                yield x.reshape(-1)[index], index

    def parts(self) -> Iterator[tuple[FactoredState, Tensor]]:
        """Yield every part's state, with the index of its elements in the flattened tensor, [rows, columns]."""
        yield from zip(self.states, (index for _, index in self._matrices(self.p)), strict=True)

    def step(self, g: Tensor, **options: Any) -> Tensor:
        new = self.p.reshape(-1).clone()
        gradients = self._matrices(g)
        for state, (matrix, index), (gradient, _) in zip(self.states, self._matrices(self.p), gradients, strict=True):
            new[index] = factored_reference_step(matrix, gradient, state, **options)
        self.p = new.reshape(self.shape)
        return self.p


def state_of(p: Tensor, layout: FactoredLayout, moment: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state before the first step; the first moment has the parameter's dtype unless another is given."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(p, dtype=moment),
        "exp_avg_sq": torch.zeros(layout.aligned_shape(p.shape), dtype=dtype),
        "exp_avg_sq_col": torch.zeros(layout.columns_shape(p.shape), dtype=dtype),
    }
