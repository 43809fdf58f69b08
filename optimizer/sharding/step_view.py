"""One step's view of the groups: local tensors in the place of sharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..interface import Position
from ..partition.layout import AnyLayout, Layout
from ..step.dtypes import second_moment_dtype
from ..step.hyper import Hyper
from .cut_update import cut_update
from .exchange import block_means
from .shard import Free, Shard


class StepView:
    """One step's view of the groups: local tensors where parameters are sharded.

    Attributes:
        groups, layouts, states: as the engines take them, by group.
        cut: tensors whose blocks other ranks share, with their local gradients.
        free: parts of those that engines take, by their place in the group: of which parameter they are part.
        empty: parameters of which nothing is held here: their state counts steps, as on the other ranks.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]], states: Mapping[Tensor, Any]
    ) -> None:
        self.groups = list(groups)
        # Those of sharded parameters are replaced by their local ones before an engine sees them.
        self.layouts = cast(list[list[Layout]], list(layouts))
        self.states: list[Mapping[Tensor, Any]] = [states] * len(groups)
        self.cut: dict[Position, tuple[Shard, Tensor | None]] = {}
        self.free: dict[Position, tuple[int, Free]] = {}
        self.empty: list[Position] = []
        self._lent: list[Tensor] = []
        self._means: list[Tensor | None] = []

    def lend(self, view: Tensor, grad: Tensor | None) -> None:
        """Give a view a gradient for the time of the step."""
        view.grad = grad
        self._lent.append(view)

    def among(self, g: int, only: int | None) -> Sequence[int] | None:
        """Where the engines find parameter ``only`` of a group, or all its free parts; None for everything."""
        if only is None:
            return None
        return [only, *(place for (group, place), (i, _) in self.free.items() if group == g and i == only)]

    def state_of(self, whole: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
        """The state of what engines take, from that of parameters."""

        def found(g: int, place: int) -> dict[str, Any]:
            known = self.free.get((g, place))
            return whole(g, place) if known is None else known[1].state(whole(g, known[0]))

        return found

    def exchange(self, grad_scale: Tensor | None = None) -> None:
        """Sum what ranks share; afterwards nothing communicates."""
        if self.cut:
            for position, (shard, grad) in self.cut.items():
                if grad is not None and grad_scale is not None:
                    self.cut[position] = shard, grad / grad_scale
            self._means = block_means(
                [(shard.geometry, grad, second_moment_dtype(shard.view)) for shard, grad in self.cut.values()]
            )

    def step(self, hyper_of: Callable[[Mapping[str, Any]], Hyper], state_of: Callable[[int, int], Any]) -> None:
        """Step the tensors whose blocks are shared, unless a GradScaler found that nothing must be stepped."""
        for g, i in self.empty:
            if not hyper_of(self.groups[g]).skips():
                state_of(g, i)["step"] += 1
        for ((g, i), (shard, grad)), means in zip(self.cut.items(), self._means, strict=True):
            hyper = hyper_of(self.groups[g])
            if means is None or hyper.skips():
                continue
            state = state_of(g, i)
            if grad is None:
                shard.forget()  # free parts take their step of zeros with the others, and their counters stand still
            state["step"] += 1
            cut_update(
                shard.geometry, shard.view, grad, state["exp_avg"], state["exp_avg_sq"], means,
                step=state["step"].item(), **hyper.numbers(),
            )  # fmt: skip

    def end(self) -> None:
        """Give the gradients back."""
        for view in self._lent:
            view.grad = None
