"""Which parameters are sharded, and the geometry and first moment of one that is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..interface import wrappers
from ..partition.factored import FactoredLayout
from ..partition.layout import AnyLayout, Layout
from ..step.dtypes import moment_format, second_moment_dtype
from ..step.labels import label
from ..step.moments import FORMATS
from .exchange import destroyed
from .flat import FlatLayout, flat_geometry
from .flat_moments import FlatMoment
from .geometry import Geometry
from .kinds import is_dtensor, is_dtensor_type
from .placed_moments import cuts_rows
from .shard import Shard

logger = logging.getLogger("optimizer")
_SHOWN = 3  # names listed in a message


def saves_elements(parameter: Tensor) -> bool:
    """Return whether a library saves the parameter's state element by element, even if one rank has all of it."""
    return any(wrapper.saves_elements(parameter) for wrapper in wrappers())


def is_sharded(parameter: Tensor, layout: AnyLayout) -> bool:
    """Return whether the parameter is a DTensor or contains ranges of flattened tensors."""
    return is_dtensor(parameter) or isinstance(layout, FlatLayout)


def any_sharded(parameters: Sequence[Tensor], layouts: Sequence[AnyLayout]) -> bool:
    """Return whether ``is_sharded`` holds for any pair.

    Every step asks this of every parameter, so types are collected first: a Python call per tensor takes longer.
    """
    kinds = set(map(type, layouts))
    return any(issubclass(kind, FlatLayout) for kind in kinds) or any(map(is_dtensor_type, set(map(type, parameters))))


def flat_moment(parameter: Tensor, layout: AnyLayout, group: Mapping[str, Any]) -> FlatMoment | None:
    """Return the first moment of a flat parameter; None for a DTensor."""
    if not isinstance(layout, FlatLayout):
        return None
    name = group["exp_avg_dtype"]
    format = FORMATS[name] if isinstance(name, str) else None
    return FlatMoment(layout.ranges, layout.numel, format, second_moment_dtype(parameter))


def geometry_of(parameter: Tensor, layout: AnyLayout, where: str, flat: FlatMoment | None) -> Geometry:
    """Return the local geometry of a sharded parameter.

    Args:
        parameter: the parameter.
        layout: its layout.
        where: description of the parameter for error messages.
        flat: the first moment of a flat parameter.
    """
    if not isinstance(layout, FlatLayout):
        from .placed import placed_geometry
        from .placed_columns import placed_factored_geometry

        if isinstance(layout, FactoredLayout):
            return placed_factored_geometry(parameter, layout, where)  # type: ignore[arg-type]
        assert isinstance(layout, Layout)
        return placed_geometry(parameter, layout, where)  # type: ignore[arg-type]
    layout.require(parameter.shape, where)
    quantised = flat is not None and flat.format is not None
    if not layout.group:
        return flat_geometry(layout.ranges, layout.numel, None, parameter.device, where, quantised=quantised)
    try:
        group = dist.distributed_c10d._resolve_process_group(layout.group)  # type: ignore[arg-type]
    except (RuntimeError, KeyError) as error:
        raise destroyed(f"the process group that {where} is sharded over") from error
    device = parameter.device
    if device.type not in {supported.type for supported in group._device_types}:
        # The parameter was offloaded to a device on which the group cannot communicate.
        device = group._device_types[0]
    return flat_geometry(layout.ranges, layout.numel, group, device, where, quantised=quantised)


def report_cut_rows(
    groups: Sequence[Mapping[str, Any]],
    layouts: Sequence[list[AnyLayout]],
    shard_of: Callable[[int, int, Mapping[str, Any], AnyLayout], Shard | None],
) -> None:
    """Log on rank 0 which quantised first moments have rows that ranks hold pieces of.

    Args:
        groups: the optimizer's parameter groups.
        layouts: the layouts of their parameters, by group.
        shard_of: returns the shard of a parameter, as ``Shards.of`` does.
    """
    cut = []
    for g, group in enumerate(groups):
        for i, parameter in enumerate(group["params"]):
            shard = shard_of(g, i, group, layouts[g][i])
            held = shard.geometry.placed.held if shard is not None and shard.geometry.placed is not None else {}
            if cuts_rows(tuple(parameter.shape), held) and moment_format(parameter, group) is not None:
                cut.append(label(group, g, i))
    if cut and dist.get_rank() == 0:
        logger.info(
            "sharding cuts the rows of %d quantised first moments, so each rank quantises its own piece of a row, and "
            "results differ from one process by rounding: %s",
            len(cut),
            ", ".join(cut[:_SHOWN]) + (f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""),
        )
