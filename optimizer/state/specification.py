"""What is kept of one parameter: names, dtypes, shapes, and bytes.

``step`` (0-dim fp32), ``exp_avg`` (the parameter's shape, or codes of it and ``exp_avg_scale``), ``exp_avg_sq`` (one
value per index of the layout's axis), and ``compensation`` (bf16) under Kahan rounding. Nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..step import moments
from ..step.dtypes import moment_dtype, moment_format, rounding_of, second_moment_dtype


def step_counter(parameter: Tensor, group: Mapping[str, Any], taken: float = 0.0) -> Tensor:
    """``step``: on the parameter's device where no engine may wait for that device, as in torch, else on the CPU."""
    on_device = group["capturable"] or group["fused"]
    return torch.tensor(taken, dtype=torch.float32, device=parameter.device if on_device else "cpu")


def new_state(parameter: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """State before the first step.

    Args:
        parameter: the parameter; what has its shape is made like it, a DTensor where it is one.
        exp_avg_sq: zeros of the aligned shape, ``second_moment_dtype``; becomes part of the state.
        group: the options of the parameter's group.
    """
    state: dict[str, Any] = {"step": step_counter(parameter, group)}
    kept = moment_format(parameter, group)
    if kept is None:
        state["exp_avg"] = _zeros_like(parameter, moment_dtype(parameter, group))
    else:
        state |= moments.zero_state(parameter, kept)
    state["exp_avg_sq"] = exp_avg_sq
    if rounding_of(parameter, group) == "kahan":
        state["compensation"] = _zeros_like(parameter, torch.bfloat16)
    return state


def zero_second_moment(parameter: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``exp_avg_sq`` before the first step."""
    return torch.zeros(shape, dtype=second_moment_dtype(parameter), device=device)


def _zeros_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def state_bytes(
    parameter: Tensor, held: tuple[int, ...], aligned: tuple[int, ...], group: Mapping[str, Any]
) -> dict[str, int]:
    """Bytes by kind, whether the state exists yet or not; scales of a quantised moment count as ``exp_avg``.

    Args:
        parameter: the parameter, for its dtype and whether its moment is quantised.
        held: shape of what this rank holds of it.
        aligned: shape of the second moment here.
        group: the options of the parameter's group.
    """
    kept = moment_format(parameter, group)
    count = {
        "exp_avg": prod(held) * moment_dtype(parameter, group).itemsize
        if kept is None
        else moments.state_bytes(held, kept),
        "exp_avg_sq": prod(aligned) * second_moment_dtype(parameter).itemsize,
        "step": torch.float32.itemsize,
    }
    if rounding_of(parameter, group) == "kahan":
        count["compensation"] = prod(held) * torch.bfloat16.itemsize
    return count
