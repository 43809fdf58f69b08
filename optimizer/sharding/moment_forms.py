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

from ..state.first_moments import joined, spread
from ..step import moments
from ..step.dtypes import moment_format, second_moment_dtype
from ..step.places import Place
from . import placed_moments
from .geometry import Placed
from .kinds import is_dtensor, local_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .shard import Shard


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
    codes, scale = joined(
        values.flatten(-axes),
        None if scales is None else scales.flatten(-axes),
        format,
        step=step,
        seed=seed,
        first=place.blocks(0, prod(of_scale), format.block, values.device),
    )
    return codes.reshape(stored), scale.reshape(of_scale)


def widened(shard: Shard, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the first moment of a DTensor parameter by element, if it is quantised and ranks hold pieces of rows.

    Args:
        shard: the shard.
        state: the parameter's state.

    Returns:
        ``exp_avg`` and ``exp_avg_scale`` with the parameter's placements; nothing if they can stay as they are.
    """
    if "exp_avg_scale" not in state or not shard.by_element:
        return {}
    parameter: Any = shard.parameter
    local = local_of(parameter)
    both = by_element(
        local_of(state["exp_avg"]),
        local_of(state["exp_avg_scale"]),
        tuple(local.shape),
        moments.row_axes(parameter.shape),
        second_moment_dtype(parameter),
    )
    return {name: like(parameter, x) for name, x in zip(("exp_avg", "exp_avg_scale"), both, strict=True)}


def like(parameter: DTensor, local: Tensor) -> DTensor:
    """Return a local tensor as a DTensor with the shape and the placements of a parameter."""
    return Placed(parameter.device_mesh, tuple(parameter.placements), tuple(parameter.shape), {}, {}).wrap(local)


def narrowed(shard: Shard, group: Mapping[str, Any], state: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a saved first moment of a DTensor parameter in the form that the optimizer stores.

    Args:
        shard: the shard.
        group: the options of the parameter's group.
        state: the parameter's state in a state dict.
        seed: seed of the rounding of what was not quantised before.

    Returns:
        The state with another first moment; unchanged if that fits, or if the state is not sharded as the parameter.
    """
    parameter: Any = shard.parameter
    target, moment, scale = moment_format(parameter, group), state.get("exp_avg"), state.get("exp_avg_scale")
    if shard.place is None or not is_dtensor(moment) or (target is None and scale is None):
        return dict(state)
    assert moment is not None
    coded = scale is not None and not moment.is_floating_point()
    if coded and target is moments.format_of(moment) and not shard.by_element:
        return dict(state)
    values, scales, shape = local_of(moment), None if scale is None else local_of(scale), tuple(parameter.shape)
    local, axes, dtype = local_of(parameter), moments.row_axes(shape), second_moment_dtype(parameter)
    if coded:
        fits = tuple(values.shape) == moments.state_shapes(tuple(local.shape), moments.format_of(moment), axes)[0]
        if not fits or shard.by_element or scales is None:
            return dict(state)
        values, scales = by_element(values, scales, tuple(local.shape), axes, dtype)
    elif tuple(moment.shape) != shape or tuple(values.shape) != tuple(local.shape):
        return dict(state)
    out = {name: x for name, x in state.items() if name != "exp_avg_scale"}
    if target is None:
        return {**out, "exp_avg": like(parameter, values)}
    step = int(float(state.get("step", 0)))
    device = local.device
    codes, new = quantised(
        values.to(device, dtype),
        None if scales is None else scales.to(device, dtype),
        target,
        shard.place,
        step=step,
        seed=seed,
    )
    return out | placed_moments.wrapped(parameter, codes, new, target)
