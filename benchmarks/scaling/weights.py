"""What the simulator knows of a model: shapes, layouts, and what tensor parallelism cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from optimizer.partition import Anatomy, Layout, Rules, discover, layout_of
from optimizer.tools.plan.sharding import tensor_parallel_axis


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: as in ``named_parameters``.
        role: what it does; several words where it is fused.
        shape, layout: whole.
        axis: what tensor parallelism cuts; None where every rank has all of it.
        decays: whether an optimizer that is built from the model decays it, which decides its parameter group.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layout: Layout
    axis: int | None
    decays: bool


def weights_of(
    model: nn.Module, rules: str = "adam_mini", axis_of: Callable[[str, Anatomy], int | None] | None = None
) -> list[Weight]:
    """Every parameter of a model, tied ones once, in the model's order.

    Args:
        model: on any device; ``meta`` will do.
        rules: a shipped set of rules.
        axis_of: (name, anatomy) -> the axis that tensor parallelism cuts; by role where it is None.
    """
    chosen = Rules.load(rules)
    return [
        Weight(
            name,
            "+".join(role.value for role in anatomy.roles),
            tuple(anatomy.shape),
            layout_of(anatomy, chosen, name),
            axis_of(name, anatomy) if axis_of else tensor_parallel_axis(anatomy),
            anatomy.decays,
        )
        for name, anatomy in discover(model).items()
    ]
