"""The state of one parameter: names, dtypes, shapes, first values and bytes.

The entries are ``step`` (0-dim fp32), ``exp_avg`` (the parameter's shape; or codes and ``exp_avg_scale`` if it is
quantised), ``exp_avg_sq`` (one value per index of the layout's axis), ``exp_avg_sq_col`` under a factored layout
(``exp_avg_sq`` then has the means of rows, this one those of columns), and ``compensation`` (bf16) with Kahan rounding.
There are no others.
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
    """Return the entry ``step``.

    As in torch, it is on the parameter's device if the step must not wait for that device, otherwise on the CPU.

    Args:
        parameter: the parameter.
        group: the options of the parameter's group.
        taken: number of steps taken.
    """
    on_device = group["capturable"] or group["fused"]
    return torch.tensor(taken, dtype=torch.float32, device=parameter.device if on_device else "cpu")


def new_state(
    parameter: Tensor,
    exp_avg_sq: Tensor,
    group: Mapping[str, Any],
    exp_avg_sq_col: Tensor | None = None,
    quantised: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the state before the first step.

    Args:
        parameter: the parameter. Entries of its shape are DTensors if it is one.
        exp_avg_sq: zeros in the aligned shape, of ``second_moment_dtype``. The tensor becomes part of the state.
        group: the options of the parameter's group.
        exp_avg_sq_col: under a factored layout, zeros in the shape of the column means; part of the state, too.
        quantised: the zeros of a quantised first moment, if the parameter is sharded and its moment is quantised.
    """
    state: dict[str, Any] = {"step": step_counter(parameter, group)}
    moment = moment_format(parameter, group)
    if quantised is not None:
        state |= quantised
    elif moment is None:
        state["exp_avg"] = _zeros_like(parameter, moment_dtype(parameter, group))
    else:
        state |= moments.zero_state(parameter, moment)
    state["exp_avg_sq"] = exp_avg_sq
    if exp_avg_sq_col is not None:
        state["exp_avg_sq_col"] = exp_avg_sq_col
    if rounding_of(parameter, group) == "kahan":
        state["compensation"] = _zeros_like(parameter, torch.bfloat16)
    return state


def zero_second_moment(parameter: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``exp_avg_sq`` before the first step, as zeros of this shape."""
    return torch.zeros(shape, dtype=second_moment_dtype(parameter), device=device)


def _zeros_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def state_bytes(
    parameter: Tensor,
    held: tuple[int, ...],
    aligned: tuple[int, ...],
    group: Mapping[str, Any],
    columns: tuple[int, ...] | None = None,
) -> dict[str, int]:
    """Return the bytes of a parameter's state by name of the entry, whether the state exists yet or not.

    The scales of a quantised moment count as ``exp_avg``, the column means of a factored one as ``exp_avg_sq``.

    Args:
        parameter: the parameter. Its dtype and shape decide the dtypes, and whether its moment is quantised.
        held: shape of the local parameter on this rank.
        aligned: shape of the local second moment on this rank.
        group: the options of the parameter's group.
        columns: shape of the local column means on this rank; None if the second moment is not factored.
    """
    moment, row = moment_format(parameter, group), moments.row_axes(parameter.shape)
    count = {
        "exp_avg": prod(held) * moment_dtype(parameter, group).itemsize
        if moment is None
        else moments.state_bytes(held, moment, row),
        "exp_avg_sq": (prod(aligned) + (0 if columns is None else prod(columns)))
        * second_moment_dtype(parameter).itemsize,
        "step": torch.float32.itemsize,
    }
    if rounding_of(parameter, group) == "kahan":
        count["compensation"] = prod(held) * torch.bfloat16.itemsize
    return count
