"""The paper's transcription of one tensor's steps, and its factored form, as the fuzzer compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from optimizer import Layout
from optimizer.partition import FactoredLayout
from optimizer.partition.roles import viewed
from optimizer.step.reference import initial_state, reference_step
from tests.optimizer import factored_steps


class Blocks:
    """The reference of a tensor with one second-moment scalar per block; ``p`` and ``t`` after the steps so far."""

    def __init__(self, layout: Layout, p: Tensor) -> None:
        self.p, self._layout, self._ids = p, layout, layout.block_ids(p.shape)
        self._state = initial_state(p, self._ids)

    @property
    def t(self) -> int:
        return self._state.t

    def step(self, g: Tensor, **options: float) -> None:
        self.p = reference_step(self.p, g, self._state, self._ids, **options)  # type: ignore[arg-type]

    def second(self) -> Tensor:
        """The second moment of each element."""
        return self._state.v.double()[self._ids]

    def moments(self, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, an optimizer's values and these, per element."""
        view = viewed(tuple(self.p.shape), self._layout.fold)
        v = own["exp_avg_sq"].double().reshape(self._layout.unfolded().aligned_shape(view))
        yield "second moment", v.expand(view).reshape(self.p.shape), self.second()


class Factored:
    """The reference of a tensor with a factored second moment, likewise."""

    def __init__(self, layout: FactoredLayout, p: Tensor) -> None:
        self._layout, self._reference, self.t = layout, factored_steps.Reference(p, layout), 0

    @property
    def p(self) -> Tensor:
        return self._reference.p

    def step(self, g: Tensor, **options: float) -> None:
        self._reference.step(g, **options)
        self.t += 1

    def _means(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of each element's row and of its column, and the second moment."""
        out = [torch.zeros(self.p.numel(), dtype=torch.float64) for _ in range(3)]
        for state, index in self._reference.parts():
            rows, columns, mean = state.r[:, None], state.c[None, :], state.r.mean()
            each = rows * columns / mean if mean > 0 else torch.zeros_like(rows * columns)
            for x, values in zip(out, (rows, columns, each), strict=True):
                x[index] = values.expand(index.shape)
        rows, columns, each = (x.reshape(self.p.shape) for x in out)
        return rows, columns, each

    def second(self) -> Tensor:
        """The second moment of each element."""
        return self._means()[2]

    def moments(self, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, an optimizer's values and these, per element."""
        view, plain = viewed(tuple(self.p.shape), self._layout.fold), self._layout.unfolded()
        rows, columns, _ = self._means()
        r = own["exp_avg_sq"].double().reshape(plain.aligned_shape(view))
        yield "mean of rows", r.expand(view).reshape(self.p.shape), rows
        c = own["exp_avg_sq_col"].double().reshape(plain.columns_shape(view))
        c = c.index_select(plain.axis, plain.part_of_row())
        yield "mean of columns", c.expand(view).reshape(self.p.shape), columns


def reference_of(layout: Layout | FactoredLayout, p: Tensor) -> Blocks | Factored:
    """The reference of a tensor, float64, before the first step."""
    return Factored(layout, p) if isinstance(layout, FactoredLayout) else Blocks(layout, p)
