"""One parameter's state as read from a checkpoint of this optimizer, Adam, AdamW or the published adam-mini package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..partition.layout import Runs
from ..step import moments
from .blocks import Axes, each, resampled, whole

# Keys of the states of other optimizers, and the optimizer that each indicates.
_ELSEWHERE = {
    "row_var": "torch.optim.Adafactor",
    "col_var": "torch.optim.Adafactor",
    "variance": "torch.optim.Adafactor",
    "exp_avg_sq_row": "Adafactor",
    "exp_inf": "torch.optim.Adamax",
    "mu_product": "torch.optim.NAdam",
    "momentum_buffer": "torch.optim.SGD or Muon",
    "square_avg": "torch.optim.RMSprop or Adadelta",
    "acc_delta": "torch.optim.Adadelta",
    "sum": "torch.optim.Adagrad",
    "step_size": "torch.optim.Rprop",
    "state1": "bitsandbytes",
    "z": "a schedule-free optimizer",
}
_OWN = {"step", "exp_avg", "exp_avg_sq", "exp_avg_sq_col", "exp_avg_scale", "compensation"}


@dataclass(frozen=True)
class Saved:
    """One parameter's state in a checkpoint. The tensors are those of the checkpoint, not copies.

    Attributes:
        step: number of steps taken.
        exp_avg: first moment in the parameter's shape; quantised codes if there is a ``scale``.
        exp_avg_sq: second moment; each axis has the parameter's size, a divisor of it (axis 0) or size 1.
        columns: means of columns of a factored second moment, whose row means are ``exp_avg_sq``; None if it is not
            factored.
        scale: scales of a quantised first moment; None if it is not quantised.
        scales: the scale of each element of a first moment that was saved by element, as it is where ranks hold pieces
            of rows: ``exp_avg`` has its values.
        compensation: Kahan compensation of a bf16 parameter; None if there is none.
        axes: the blocks of the second moment; None if the checkpoint does not state them.
        blocks: description of the blocks for error messages.
        dropped: keys without meaning for this optimizer, which are not loaded.
        others: entries with unknown keys, which are loaded unchanged.
        packed: whether the first moment is that of a flat parameter, in the form in which the optimizer stores it.
    """

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    columns: Tensor | None = None
    scale: Tensor | None = None
    compensation: Tensor | None = None
    axes: Axes | None = None
    blocks: str = ""
    dropped: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    scales: Tensor | None = None


def is_published(state: Mapping[str, Any]) -> bool:
    """Return whether the published adam-mini package (1.0.x, 1.1.x) wrote this state."""
    return "m" in state and ("v" in state or "vmean" in state)


Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of codes and scales."""


def read(state: Mapping[str, Any], shape: Sequence[int], where: str, packed: Shapes | None = None) -> Saved:
    """Read and check a parameter's state.

    Args:
        state: the parameter's entries in the checkpoint.
        shape: the parameter's shape.
        where: description of the parameter for error messages.
        packed: shapes of a quantised first moment, if the parameter is flat and its moment is quantised.

    Raises:
        ValueError: the state belongs to another optimizer, an entry is missing or invalid, or a shape does not fit the
            parameter.
    """
    read_state = _published if is_published(state) else _adam
    saved = read_state(state, tuple(shape), where)
    packed = None if saved.scale is None else packed
    if saved.scale is not None and saved.exp_avg.is_floating_point() and saved.scale.shape == saved.exp_avg.shape:
        saved = replace(saved, scale=None, scales=saved.scale)
    _require_moment(saved, tuple(shape), where, packed)
    return replace(saved, packed=packed is not None)


def _adam(state: Mapping[str, Any], shape: tuple[int, ...], where: str) -> Saved:
    """Read a state with the names of this optimizer, Adam and AdamW."""
    missing = sorted({"exp_avg", "exp_avg_sq"} - state.keys())
    if missing or "mu_product" in state:
        hints = sorted({_ELSEWHERE[key] for key in state if key in _ELSEWHERE})
        raise ValueError(
            f"state of {where} has {sorted(state)}{', no ' + ' and '.join(missing) if missing else ''}: "
            f"{'it looks like a state of ' + ' or '.join(hints) if hints else 'not an AdamMini state'}; only those of "
            "AdamMini, Adam, AdamW and the adam-mini package can be loaded, so start that parameter without state"
        )
    v = _tensor(state, "exp_avg_sq", where)
    known_keys = _OWN | {"max_exp_avg_sq"}
    return Saved(
        _step(state, where),
        _tensor(state, "exp_avg", where),
        v,
        columns=_tensor(state, "exp_avg_sq_col", where) if "exp_avg_sq_col" in state else None,
        scale=_tensor(state, "exp_avg_scale", where) if "exp_avg_scale" in state else None,
        compensation=_tensor(state, "compensation", where) if "compensation" in state else None,
        blocks=f"shape {tuple(v.shape)}",
        dropped=("max_exp_avg_sq",) if "max_exp_avg_sq" in state else (),
        others={key: value for key, value in state.items() if key not in known_keys},
    )


def _published(state: Mapping[str, Any], shape: tuple[int, ...], where: str) -> Saved:
    """Read a state of the published package: ``m``, and ``v`` per element or ``vmean`` per chunk of the flat tensor."""
    m, step = _tensor(state, "m", where), _step(state, where)
    if m.numel() != prod(shape):
        raise ValueError(
            f"m of {where} has {m.numel()} elements in the checkpoint, but the parameter has shape {shape}; a state "
            "saved on several ranks must be gathered first"
        )
    key = "v" if "v" in state else "vmean"
    v = _tensor(state, key, where)
    m, blocks = m.reshape(shape), f"{key} of shape {tuple(v.shape)}"
    if key == "v":
        if v.numel() != prod(shape):
            raise ValueError(f"v of {where} has shape {tuple(v.shape)} in the checkpoint, but the parameter {shape}")
        return Saved(step, m, v.reshape(shape), axes=tuple(each(size) for size in shape), blocks=blocks)
    if v.numel() == 0 or prod(shape) % v.numel():
        raise ValueError(
            f"vmean of {where} has {v.numel()} values, which do not divide its {prod(shape)} elements; a state saved "
            "on several ranks must be gathered first"
        )
    return Saved(step, m, _per_row(v.reshape(-1), shape), axes=_chunks(v.numel(), shape), blocks=blocks)


def _chunks(count: int, shape: tuple[int, ...]) -> Axes | None:
    """Return ``count`` equal chunks of the flattened tensor as blocks; None if a chunk ends inside a row."""
    if count == 1:
        return tuple(whole(size) for size in shape)
    if shape[0] % count:
        return None
    return (Runs(((shape[0] // count, count),)), *(whole(size) for size in shape[1:]))


def _per_row(chunks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mean of each row's chunks, with one axis per axis of the tensor."""
    if chunks.numel() == 1:
        return chunks.reshape((1,) * len(shape))
    if shape[0] % chunks.numel():
        chunks = resampled(chunks.to("cpu", torch.float64), shape[0])
    return chunks.reshape(-1, *(1 for _ in shape[1:]))


def _require_moment(saved: Saved, shape: tuple[int, ...], where: str, packed: Shapes | None) -> None:
    """Raise ValueError unless the first moment has the parameter's shape, or the shapes of its codes and scales."""
    if saved.scale is None:
        moment_shape: tuple[int, ...] = shape
        if not saved.exp_avg.is_floating_point():
            raise ValueError(
                f"exp_avg of {where} is {saved.exp_avg.dtype} in the checkpoint, without the exp_avg_scale it needs"
            )
    else:
        if saved.exp_avg.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"exp_avg of {where} has a scale, but is {saved.exp_avg.dtype}, not int8 or uint8 codes")
        moment_shape, scale_shape = packed or (
            moments.state_shapes(shape, moments.format_of(saved.exp_avg)) if shape else ((-1,), (-1,))
        )
        if tuple(saved.scale.shape) != scale_shape:
            raise ValueError(
                f"exp_avg_scale of {where} has shape {tuple(saved.scale.shape)} in the checkpoint, but a parameter of "
                f"shape {shape} needs {scale_shape}"
            )
    entries = (("exp_avg", saved.exp_avg, moment_shape), ("compensation", saved.compensation, shape))
    for name, tensor, expected in entries:
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} of {where} has shape {tuple(tensor.shape)} in the checkpoint, but the parameter needs "
                f"{expected}; is it a checkpoint of another model?"
            )


def _tensor(state: Mapping[str, Any], key: str, where: str) -> Tensor:
    """Return an entry of a state; raise ValueError if it is not a tensor."""
    value = state[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {where} is a {type(value).__name__} in the checkpoint, not a tensor")
    return value


def _step(state: Mapping[str, Any], where: str) -> float:
    """Return the number of steps taken, which may be a one-element tensor or a number."""
    if "step" not in state:
        raise ValueError(
            f"state of {where} has no 'step', only {sorted(state)}; put the number of steps it has taken there, as a "
            "number or a 0-dim tensor, and load again"
        )
    value = state["step"]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"step of {where} is {value!r} in the checkpoint, not a number of steps >= 0")
    return float(value)
