"""The reference step of a whole tensor under any layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optimizer.partition import FactoredLayout, Layout, TensorLayout
from optimizer.step.reference import initial_state, reference_step
from tests.optimizer.factored_steps import Reference as FactoredReference


class BlockReference:
    """The reference of a layout of blocks."""

    def __init__(self, p: Tensor, layout: Layout) -> None:
        self.p, self.ids = p.clone(), layout.block_ids(p.shape)
        self.state = initial_state(self.p, self.ids)

    def step(self, g: Tensor, **options: Any) -> Tensor:
        self.p = reference_step(self.p, g, self.state, self.ids, **options)
        return self.p


def reference_of(p: Tensor, layout: TensorLayout) -> BlockReference | FactoredReference:
    """Return the reference of a tensor, before its first step."""
    return FactoredReference(p, layout) if isinstance(layout, FactoredLayout) else BlockReference(p, layout)
