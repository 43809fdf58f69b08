"""Forms of quantised first moments of sharded parameters: as the optimizer stores them, and by element.

By element, a moment has one value and one scale for each element, in the parameter's shape and the dtype of second
moments. State has this form in state dicts where codes and scales cannot be divided as the parameter is: where ranks
hold pieces of rows. It loses nothing, so blocks whose elements come together again have the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state.first_moments import joined, row_slices, spread
from ..step import moments
from ..step.dtypes import moment_format, second_moment_dtype
from ..step.places import Place
from . import placed_moments
from .flat_moments import FlatMoment
from .geometry import Placed
from .kinds import is_dtensor, local_of

if TYPE_CHECKING:
    from .shard import Shard

_NAMES = ("exp_avg", "exp_avg_scale")


def rows_of(codes: Tensor, axes: int) -> Tensor:
    """Return codes as stored with the axes of a row joined to one; ``axes`` is their number."""
    return codes.flatten(-axes) if codes.dtype == torch.int8 else codes


def by_element(
    codes: Tensor, scale: Tensor, shape: tuple[int, ...], axes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a quantised moment by element: values and scales.

    Args:
        codes: codes as stored.
        scale: their scales.
        shape: shape of the tensor, or of a shard of it.
        axes: number of axes of a row.
        dtype: dtype of the results.
    """
    if not prod(shape):
        empty = torch.zeros(shape, dtype=dtype, device=codes.device)
        return empty, empty.clone()
    both = spread(rows_of(codes, axes), scale, prod(shape[-axes:]), dtype)
    return both[0].reshape(shape), both[1].reshape(shape)


def quantised(
    values: Tensor,
    scales: Tensor | None,
    format: moments.Format,
    place: Place,
    *,
    step: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return codes and scales, as stored, from a moment by element.

    Args:
        values: the values of a tensor, or of a shard of it.
        scales: the scale of each element; None if the moment was not quantised.
        format: the format.
        place: where the shard lies in the whole tensor.
        step: number of steps taken, for the rounding of what was not quantised before.
        seed: seed of that rounding.
    """
    axes = moments.row_axes(place.shape)
    stored, of_scale = moments.state_shapes(tuple(values.shape), format, axes)
    if not values.numel():
        zeros = torch.zeros(stored, dtype=format.dtype, device=values.device)
        return zeros, torch.zeros(of_scale, dtype=format.scale_dtype, device=values.device)
    n = prod(values.shape[-axes:])
    rows, each = values.reshape(-1, n), None if scales is None else scales.reshape(-1, n)
    per_row = of_scale[-1]
    parts = []
    for span in row_slices(*rows.shape):
        count = (span.stop - span.start) * per_row
        first = place.blocks(span.start * per_row, count, format.block, values.device)
        own = None if each is None else each[span]
        parts.append(joined(rows[span], own, format, step=step, seed=seed, first=first))
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.reshape(stored), scale.reshape(of_scale)


def widened(
    shard: Shard | None, parameter: Any, group: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a quantised first moment by element, if it cannot be divided as it is stored.

    Args:
        shard: the shard of a parameter; None for a whole one that FSDP1 flattened, whose moment is returned by element
            in any case.
        parameter: the parameter.
        group: the options of its group.
        state: the parameter's state.

    Returns:
        ``exp_avg`` and ``exp_avg_scale``, with the placements of a DTensor; nothing if they can stay as they are. FSDP1
        needs the same entries for all parameters, so one that is too small to quantise has scales of 0.
    """
    if "exp_avg" not in state or not isinstance(group["exp_avg_dtype"], str):
        return {}
    if "exp_avg_scale" not in state:
        flattened = shard is None or shard.flat is not None
        return {"exp_avg_scale": torch.zeros_like(state["exp_avg"])} if flattened else {}
    if shard is not None and not shard.by_element:
        return {}
    codes, scale = (local_of(state[name]) for name in _NAMES)
    if shard is not None and shard.flat is not None:
        return dict(zip(_NAMES, shard.flat.by_element(codes, scale), strict=True))
    axes, dtype = moments.row_axes(parameter.shape), second_moment_dtype(parameter)
    both = by_element(codes, scale, tuple(local_of(parameter).shape), axes, dtype)
    return {name: like(parameter, x) for name, x in zip(_NAMES, both, strict=True)}


def settled(flat: FlatMoment, state: dict[str, Any], dtype: torch.dtype) -> None:
    """Convert a first moment that a library wrote element by element to the form that the optimizer stores, in place.

    Args:
        flat: the first moment of the flat tensor.
        state: its state.
        dtype: dtype of the first moment if it is not quantised.
    """
    moment = state["exp_avg"]
    if tuple(moment.shape) != (flat.numel,) or not moment.is_floating_point():
        return
    scales = state.pop("exp_avg_scale", None)
    if flat.format is None:
        state["exp_avg"] = moment.to(dtype)
        return
    scales = scales if scales is not None and scales.shape == moment.shape else None
    state |= flat.quantised(moment, scales, step=int(float(state.get("step", 0))), seed=0)


def like(parameter: Any, local: Tensor) -> Tensor:
    """Return a local tensor with the shape and the placements of a parameter, if that is a DTensor."""
    if not is_dtensor(parameter):
        return local
    return Placed(parameter.device_mesh, tuple(parameter.placements), tuple(parameter.shape), {}, {}).wrap(local)


def narrowed(
    shard: Shard | None, parameter: Any, group: Mapping[str, Any], state: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Return a saved first moment in the form that the optimizer stores.

    Args:
        shard: the shard of a parameter; None for a whole one.
        parameter: the parameter.
        group: the options of the parameter's group.
        state: the parameter's state in a state dict.
        seed: seed of the rounding of what was not quantised before.

    Returns:
        The state with another first moment; unchanged if that fits, or if the state is not sharded as the parameter.
    """
    target, moment, scale = moment_format(parameter, group), state.get("exp_avg"), state.get("exp_avg_scale")
    flat = None if shard is None else shard.flat
    if flat is not None:
        target = flat.format
    if moment is None or is_dtensor(moment) != is_dtensor(parameter) or (target is None and scale is None):
        return dict(state)
    values, scales, local = local_of(moment), None if scale is None else local_of(scale), local_of(parameter)
    if not moment.is_floating_point():
        if shard is None or shard.by_element or scales is None or target is moments.format_of(moment):
            return dict(state)
        axes = moments.row_axes(parameter.shape)
        if tuple(values.shape) != moments.state_shapes(tuple(local.shape), moments.format_of(moment), axes)[0]:
            return dict(state)
        values, scales = by_element(values, scales, tuple(local.shape), axes, second_moment_dtype(parameter))
    elif moment.shape != parameter.shape or values.shape != local.shape:
        return dict(state)
    out = {name: x for name, x in state.items() if name != "exp_avg_scale"}
    if target is None:
        return {**out, "exp_avg": like(parameter, values)}
    step, dtype = int(float(state.get("step", 0))), second_moment_dtype(parameter)
    values = values.to(local.device, dtype)
    scales = None if scales is None else scales.to(local.device, dtype)
    if flat is not None:
        return out | flat.quantised(values, scales, step=step, seed=seed)
    place = placed_moments.place_of(tuple(parameter.shape), {}) if shard is None else shard.place
    if place is None:  # a rank outside the mesh
        return dict(state)
    both = quantised(values, scales, target, place, step=step, seed=seed)
    if is_dtensor(parameter):
        return out | placed_moments.wrapped(parameter, *both, target)
    return out | dict(zip(_NAMES, both, strict=True))
