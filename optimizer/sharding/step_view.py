"""One step's view of the parameter groups, with local tensors instead of sharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..interface import Position
from ..partition.factored import TensorLayout
from ..partition.layout import AnyLayout
from ..step.dtypes import rounding_of, second_moment_dtype
from ..step.engines import PLACES, SEEDS
from ..step.hyper import Hyper
from .cut_rounded import Rounds
from .cut_update import cut_update
from .exchange import Means, Work, block_means
from .shard import FreeBox, Shard


class StepView:
    """One step's view of the parameter groups, with local tensors instead of sharded parameters.

    Free boxes of a sharded parameter are appended to its group as further tensors.

    Attributes:
        groups: the parameter groups that engines step.
        layouts: the layouts of the tensors in ``groups``, by group.
        states: the states of the tensors in ``groups``, by group.
        cut: sharded parameters with shared blocks, by position: (shard, local gradient or None).
        free: free boxes of those parameters, by the box's position in ``groups``: (the parameter's index in its
            group, the box).
        seeds: seeds of the ranges of those that are flat, by position.
        empty: positions of parameters without elements on this rank. Their state counts steps as on other ranks.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]], states: Mapping[Tensor, Any]
    ) -> None:
        self.groups = list(groups)
        # The cast is safe: layouts of sharded parameters are replaced by local ones before an engine reads them.
        self.layouts = cast(list[list[TensorLayout]], list(layouts))
        self.states: list[Mapping[Tensor, Any]] = [states] * len(groups)
        self.cut: dict[Position, tuple[Shard, Tensor | None]] = {}
        self.free: dict[Position, tuple[int, FreeBox]] = {}
        self.seeds: dict[Position, list[int]] = {}
        self.empty: list[Position] = []
        self._lent: list[Tensor] = []
        self._means: list[Means | None] = []

    def lend(self, view: Tensor, grad: Tensor | None) -> None:
        """Set the gradient of a local tensor until ``end``."""
        view.grad = grad
        self._lent.append(view)

    def among(self, g: int, only: int | None) -> Sequence[int] | None:
        """Return the indices in ``groups[g]`` of parameter ``only`` and its free boxes; None for all tensors."""
        if only is None:
            return None
        return [only, *(index for (group, index), (i, _) in self.free.items() if group == g and i == only)]

    def state_of(self, whole: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
        """Return a function from a tensor's position in ``groups`` to its state.

        Args:
            whole: returns the local state of the parameter at a position of the optimizer's groups.
        """

        def state_at(g: int, index: int) -> dict[str, Any]:
            free = self.free.get((g, index))
            return whole(g, index) if free is None else free[1].state(whole(g, free[0]))

        return state_at

    def exchange(self, grad_scale: Tensor | None, columns_of: Callable[[int, int], Tensor | None]) -> None:
        """Sum the shared blocks over ranks. Nothing communicates later in the step.

        Args:
            grad_scale: the GradScaler's scale, by which gradients are divided first; None if they are not scaled.
            columns_of: returns the local column means of the parameter at a position; None if there are none yet.
        """
        if self.cut:
            for position, (shard, grad) in self.cut.items():
                if grad is not None and grad_scale is not None:
                    self.cut[position] = shard, grad / grad_scale
            self._means = block_means(
                [
                    Work(shard.geometry, grad, second_moment_dtype(shard.view), columns_of(*position))
                    for position, (shard, grad) in self.cut.items()
                ]
            )

    def step(self, hyper_of: Callable[[Mapping[str, Any]], Hyper], state_of: Callable[[int, int], Any]) -> None:
        """Step the tensors with shared blocks, unless a GradScaler found infinite gradients.

        Args:
            hyper_of: returns the hyper-parameters of a group.
            state_of: returns the local state of the parameter at a position.
        """
        for g, i in self.empty:
            if not hyper_of(self.groups[g]).skips():
                state_of(g, i)["step"] += 1
        for ((g, i), (shard, grad)), means in zip(self.cut.items(), self._means, strict=True):
            hyper = hyper_of(self.groups[g])
            if means is None or hyper.skips():
                continue
            state = state_of(g, i)
            if grad is None:
                # cut_update steps the free boxes too, without their step counters: copy these from the state again.
                shard.forget()
            state["step"] += 1
            cut_update(
                shard.geometry,
                shard.view,
                grad,
                state,
                means,
                self._rounds(g, i, state),
                step=state["step"].item(),
                **hyper.numbers(),
            )

    def _rounds(self, g: int, i: int, state: Mapping[str, Any]) -> Rounds | None:
        """Return how the values of a parameter with shared blocks are rounded; None if they are not."""
        group = self.groups[g]
        how = rounding_of(group["params"][i], group)
        if how is None and "exp_avg_scale" not in state:
            return None
        shard, _ = self.cut[g, i]
        seeds = self.seeds.get((g, i), ())
        return Rounds(group[SEEDS][i], how, None if shard.flat is not None else group[PLACES][i], shard.flat, seeds)

    def end(self) -> None:
        """Remove the gradients that ``lend`` set."""
        for view in self._lent:
            view.grad = None
