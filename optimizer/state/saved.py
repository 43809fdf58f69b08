"""One parameter's state as a checkpoint holds it, whatever wrote it: this optimizer, Adam and AdamW, or adam-mini."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..partition.layout import Runs
from ..step import moments
from .blocks import Axes, each, resampled, whole

_ELSEWHERE = {
    "row_var": "torch.optim.Adafactor", "col_var": "torch.optim.Adafactor", "variance": "torch.optim.Adafactor",
    "exp_avg_sq_row": "Adafactor", "exp_inf": "torch.optim.Adamax", "mu_product": "torch.optim.NAdam",
    "momentum_buffer": "torch.optim.SGD or Muon", "square_avg": "torch.optim.RMSprop or Adadelta",
    "acc_delta": "torch.optim.Adadelta", "sum": "torch.optim.Adagrad", "step_size": "torch.optim.Rprop",
    "state1": "bitsandbytes", "z": "a schedule-free optimizer",
}  # fmt: skip
_OWN = {"step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "compensation"}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of one parameter; the tensors are the checkpoint's own.

    Attributes:
        step: steps taken.
        exp_avg: first moment, the parameter's shape, or quantised codes with ``scale``.
        exp_avg_sq: second moment; its shape spreads over the parameter's.
        scale: scales of a quantised first moment.
        compensation: what rounding of a bf16 parameter owes it.
        axes: the blocks of the second moment where the checkpoint tells them; None where it does not.
        blocks: the blocks in words, for messages.
        dropped: keys that mean nothing here.
        others: keys nobody here knows; kept as they are.
    """

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scale: Tensor | None = None
    compensation: Tensor | None = None
    axes: Axes | None = None
    blocks: str = ""
    dropped: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)


def is_published(state: Mapping[str, Any]) -> bool:
    """Whether the published adam-mini package (1.0.x, 1.1.x) wrote this state."""
    return "m" in state and ("v" in state or "vmean" in state)


def read(state: Mapping[str, Any], shape: Sequence[int], where: str) -> Saved:
    """A parameter's state, checked.

    Args:
        state: as the checkpoint holds it.
        shape: the parameter's shape.
        where: the parameter in words.

    Raises:
        ValueError: another optimizer's state, a missing or impossible entry, or shapes that are not the parameter's.
    """
    read_one = _published if is_published(state) else _own
    saved = read_one(state, tuple(shape), where)
    _require_moment(saved, tuple(shape), where)
    return saved


def _own(state: Mapping[str, Any], shape: tuple[int, ...], where: str) -> Saved:
    """State under this optimizer's names, which are Adam's and AdamW's too."""
    missing = sorted({"exp_avg", "exp_avg_sq"} - state.keys())
    if missing or "mu_product" in state:
        hints = sorted({_ELSEWHERE[key] for key in state if key in _ELSEWHERE})
        raise ValueError(
            f"state of {where} has {sorted(state)}{', no ' + ' and '.join(missing) if missing else ''}: "
            f"{'it looks like a state of ' + ' or '.join(hints) if hints else 'not an AdamMini state'}; only those of "
            "AdamMini, Adam, AdamW and the adam-mini package can be loaded, so start that parameter without state"
        )
    v = _tensor(state, "exp_avg_sq", where)
    known = _OWN | {"max_exp_avg_sq"}
    return Saved(
        _step(state, where),
        _tensor(state, "exp_avg", where),
        v,
        scale=_tensor(state, "exp_avg_scale", where) if "exp_avg_scale" in state else None,
        compensation=_tensor(state, "compensation", where) if "compensation" in state else None,
        blocks=f"shape {tuple(v.shape)}",
        dropped=("max_exp_avg_sq",) if "max_exp_avg_sq" in state else (),
        others={key: value for key, value in state.items() if key not in known},
    )


def _published(state: Mapping[str, Any], shape: tuple[int, ...], where: str) -> Saved:
    """State of the published package: ``m``, and ``v`` per element or ``vmean`` per chunk of the flattened tensor."""
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
    """``count`` equal chunks of the flattened tensor as blocks; None where a chunk ends inside a row."""
    if count == 1:
        return tuple(whole(size) for size in shape)
    if shape[0] % count:
        return None
    return (Runs(((shape[0] // count, count),)), *(whole(size) for size in shape[1:]))


def _per_row(chunks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mean of each row's chunks, in a shape that spreads over the tensor's."""
    if chunks.numel() == 1:
        return chunks.reshape((1,) * len(shape))
    if shape[0] % chunks.numel():
        chunks = resampled(chunks.to("cpu", torch.float64), shape[0])
    return chunks.reshape(-1, *(1 for _ in shape[1:]))


def _require_moment(saved: Saved, shape: tuple[int, ...], where: str) -> None:
    """The first moment has the parameter's shape, or that of its codes and scales."""
    if saved.scale is None:
        wanted: tuple[int, ...] = shape
        if not saved.exp_avg.is_floating_point():
            raise ValueError(
                f"exp_avg of {where} is {saved.exp_avg.dtype} in the checkpoint, without the exp_avg_scale it needs"
            )
    else:
        if saved.exp_avg.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"exp_avg of {where} has a scale, but is {saved.exp_avg.dtype}, not int8 or uint8 codes")
        wanted, scale = moments.state_shapes(shape, moments.format_of(saved.exp_avg)) if shape else ((-1,), (-1,))
        if tuple(saved.scale.shape) != scale:
            raise ValueError(
                f"exp_avg_scale of {where} has shape {tuple(saved.scale.shape)} in the checkpoint, but a parameter of "
                f"shape {shape} needs {scale}"
            )
    for name, tensor, expected in (("exp_avg", saved.exp_avg, wanted), ("compensation", saved.compensation, shape)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} of {where} has shape {tuple(tensor.shape)} in the checkpoint, but the parameter needs "
                f"{expected}; is it a checkpoint of another model?"
            )


def _tensor(state: Mapping[str, Any], key: str, where: str) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {where} is a {type(value).__name__} in the checkpoint, not a tensor")
    return value


def _step(state: Mapping[str, Any], where: str) -> float:
    """Steps taken, from a one-element tensor or a number."""
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
