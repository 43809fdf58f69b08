"""Quantised first moments of DTensors: their place in the whole tensor, and their codes and scales as DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..step.moments import Format, row_axes, state_shapes
from ..step.places import Place
from .geometry import Placed
from .holdings import Ranges

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def cuts_rows(shape: tuple[int, ...], axes: Iterable[int]) -> bool:
    """Return whether a sharded axis is part of a row, so that ranks hold pieces of rows.

    Args:
        shape: shape of the whole tensor.
        axes: the sharded axes.
    """
    return any(axis >= len(shape) - row_axes(shape) for axis in axes)


def place_of(shape: tuple[int, ...], held: Mapping[int, Ranges]) -> Place:
    """Return the place of this rank's shard of a DTensor.

    Args:
        shape: shape of the whole tensor.
        held: for each sharded axis, the indices that this rank stores.
    """
    axes = row_axes(shape)
    lead, row = shape[:-axes], shape[-axes:]
    n = prod(row)
    if any(not ranges for ranges in held.values()):
        return Place(shape, n)  # this rank stores no element
    offset = 0
    for k, size in enumerate(row):
        ranges = held.get(len(lead) + k, ((0, size),))
        offset = offset * size + (ranges[0][0] if ranges else 0)
    if not any(axis < len(lead) for axis in held):
        return Place(shape, n, 0, offset)
    rows = torch.zeros(1, dtype=torch.int64)
    for axis, size in enumerate(lead):
        indices = torch.cat([torch.arange(*span) for span in held.get(axis, ((0, size),))])
        rows = (rows.unsqueeze(1) * size + indices).flatten()
    first = int(rows[0])
    neighbours = int(rows[-1]) - first == len(rows) - 1  # rows are ascending
    return Place(shape, n, first, offset, None if neighbours or cuts_rows(shape, held) else rows)


def moved(place: Place, local: tuple[int, ...], start: int) -> Place:
    """Return the place of a part of a shard that begins at an index of its first axis.

    Args:
        place: the place of the shard.
        local: shape of the shard.
        start: the index.
    """
    axes = row_axes(place.shape)
    if start == 0 or axes == len(local):  # a single row
        return replace(place, offset=place.offset + start * prod(local[1:]))
    return place.moved(start * prod(local[1:-axes]))


def zeros(parameter: DTensor, format: Format) -> dict[str, Tensor]:
    """Return the quantised first moment of a DTensor parameter before the first step.

    Args:
        parameter: the parameter.
        format: the format of its moment.

    Returns:
        ``exp_avg`` and ``exp_avg_scale``, see ``wrapped``.
    """
    local, axes = parameter._local_tensor, row_axes(parameter.shape)
    codes, scale = state_shapes(tuple(local.shape), format, axes)
    return wrapped(
        parameter,
        torch.zeros(codes, dtype=format.dtype, device=local.device),
        torch.zeros(scale, dtype=format.scale_dtype, device=local.device),
        format,
    )


def wrapped(parameter: DTensor, codes: Tensor, scale: Tensor, format: Format) -> dict[str, Tensor]:
    """Return local codes and scales as DTensors with the placements of their parameter.

    Args:
        parameter: the parameter.
        codes: codes of the local tensor.
        scale: their scales.
        format: their format.

    Returns:
        ``exp_avg`` and ``exp_avg_scale``. If ranks hold pieces of rows, the local tensors are those of the pieces: the
        global shapes are then those of whole rows, which the pieces need not add up to.
    """
    from torch.distributed.tensor import Replicate, Shard

    shape = tuple(parameter.shape)
    lead = len(shape) - row_axes(shape)
    placements = tuple(
        placement if isinstance(placement, Replicate) or placement.dim < lead else Shard(lead)  # type: ignore[attr-defined]
        for placement in parameter.placements
    )
    global_codes, global_scale = state_shapes(shape, format)
    own = parameter.placements if format.bits == 8 else placements  # int8 codes have the parameter's shape
    pairs = (("exp_avg", codes, global_codes, own), ("exp_avg_scale", scale, global_scale, placements))
    return {name: Placed(parameter.device_mesh, tuple(p), full, {}, {}).wrap(local) for name, local, full, p in pairs}
