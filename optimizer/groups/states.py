"""The state of the parameters in an optimizer's groups: created at first use, and counted in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..interface import Stepper
from ..partition.layout import AnyLayout
from ..sharding.shard import Shard
from ..state.specification import new_state, state_bytes, zero_second_moment


def first_state(parameter: Tensor, layout: AnyLayout, shard: Shard | None, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state before its first step.

    Args:
        parameter: the parameter.
        layout: its blocks.
        shard: the shard of the parameter on this rank; None if it is not sharded.
        group: the options of the parameter's group.
    """
    if shard is not None:
        return shard.new_state(group)
    aligned, columns = layout.aligned_shape(parameter.shape), layout.columns_shape(parameter.shape)
    rows = zero_second_moment(parameter, aligned, parameter.device)
    if columns is None:
        return new_state(parameter, rows, group)
    return new_state(parameter, rows, group, zero_second_moment(parameter, columns, parameter.device))


def total_state_bytes(optimizer: Stepper) -> dict[str, int]:
    """Return the bytes of an optimizer's state on this rank by kind, including state that does not exist yet.

    Frozen parameters without state are not counted. Call it while ``optimizer.whole()`` is open.
    """
    total: Counter[str] = Counter()
    for g, (group, layouts) in enumerate(zip(optimizer.param_groups, optimizer.layouts, strict=True)):
        for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
            if not parameter.requires_grad and not optimizer.state.get(parameter):
                continue
            shard, shape = optimizer.shard_of(g, i), tuple(parameter.shape)
            if shard is None:
                shapes = layout.aligned_shape(shape), group, layout.columns_shape(shape)
                total.update(state_bytes(parameter, shape, *shapes))
            else:
                total.update(shard.state_bytes(group))
    return dict(total)
