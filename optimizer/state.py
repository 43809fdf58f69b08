"""The optimizer's state of one parameter: what is kept, in which dtype, and how much it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import moments
from .partition.layout import Layout
from .update import second_moment_dtype


def format_of(parameter: Tensor, group: Mapping[str, Any]) -> moments.Format | None:
    """How the parameter's first moment is quantised under its group's options, or None where it is not."""
    dtype = group["exp_avg_dtype"]
    return moments.FORMATS[dtype] if isinstance(dtype, str) and moments.quantises(parameter.shape) else None


def moment_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the parameter's ``exp_avg`` under its group's options."""
    kept = format_of(parameter, group)
    if kept is not None:
        return kept.dtype
    if isinstance(group["exp_avg_dtype"], str):  # too small to quantise
        return second_moment_dtype(parameter)
    return group["exp_avg_dtype"] or parameter.dtype


def rounding_of(parameter: Tensor, group: Mapping[str, Any]) -> str | None:
    """How the parameter rounds: a choice for bf16 ones alone."""
    return group["bf16_rounding"] if parameter.dtype == torch.bfloat16 else None


def new_state(parameter: Tensor, layout: Layout, group: Mapping[str, Any]) -> dict[str, Any]:
    """State before the first step.

    The step counter lives beside the parameter where no engine may wait for the device, as in torch.
    """
    beside = group["capturable"] or group["fused"]
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device if beside else "cpu")}
    kept = format_of(parameter, group)
    state |= {"exp_avg": _zeros_like(parameter, moment_dtype(parameter, group))} if kept is None else (
        moments.zero_state(parameter, kept)
    )  # fmt: skip
    state["exp_avg_sq"] = torch.zeros(
        layout.aligned_shape(parameter.shape), dtype=second_moment_dtype(parameter), device=parameter.device
    )
    if rounding_of(parameter, group) == "kahan":
        state["compensation"] = _zeros_like(parameter, torch.bfloat16)
    return state


def _zeros_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def state_bytes(parameter: Tensor, layout: Layout, group: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by kind, whether the state exists yet or not; scales of a quantised moment count as ``exp_avg``."""
    kept = format_of(parameter, group)
    plain = parameter.numel() * moment_dtype(parameter, group).itemsize
    held = {
        "exp_avg": plain if kept is None else moments.state_bytes(parameter.shape, kept),
        "exp_avg_sq": math.prod(layout.aligned_shape(parameter.shape)) * second_moment_dtype(parameter).itemsize,
        "step": torch.float32.itemsize,
    }
    if rounding_of(parameter, group) == "kahan":
        held["compensation"] = parameter.numel() * torch.bfloat16.itemsize
    return held
