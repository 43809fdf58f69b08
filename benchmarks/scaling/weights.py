"""The simulator's description of a model: shapes, layouts, and the axes that tensor parallelism shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from optimizer.partition import Anatomy, Rules, TensorLayout, discover, layout_of
from optimizer.tools.plan.sharding import tensor_parallel_axis


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: name in ``named_parameters``.
        role: the weight's role; the roles of a fused weight are joined by "+".
        shape: shape of the full weight.
        layout: layout of the full weight.
        axis: axis that tensor parallelism shards; None if every rank has the full weight.
        decays: whether an optimizer that is built from the model applies weight decay to it. This determines its
            parameter group.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layout: TensorLayout
    axis: int | None
    decays: bool


def weights_of(
    model: nn.Module, rules: str = "adam_mini", axis_of: Callable[[str, Anatomy], int | None] | None = None
) -> list[Weight]:
    """Describe every parameter of a model, in the model's order; tied parameters occur once.

    Args:
        model: the model, on any device, including ``meta``.
        rules: name of a shipped rule set.
        axis_of: (name, anatomy) -> axis that tensor parallelism shards; None to choose the axis by role.
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
