"""The dtype of each state tensor of a parameter, and its rounding, under the options of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import moments


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of ``exp_avg_sq`` and of every sum of squares: fp32, or float64 for a float64 parameter.

    A second moment in bf16 would never decay, because 0.999 of a bf16 number rounds to the number itself.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def moment_format(
    parameter: Tensor, group: Mapping[str, Any], whole: Sequence[int] | None = None
) -> moments.Format | None:
    """Return the format in which the parameter's first moment is quantised, or None if it is not quantised.

    Args:
        parameter: the parameter, or this rank's shard of it.
        group: the options of its group.
        whole: shape of the whole parameter, which decides; None if ``parameter`` has it.
    """
    dtype, shape = group["exp_avg_dtype"], parameter.shape if whole is None else whole
    return moments.FORMATS[dtype] if isinstance(dtype, str) and moments.quantises(shape) else None


def moment_dtype(parameter: Tensor, group: Mapping[str, Any], whole: Sequence[int] | None = None) -> torch.dtype:
    """Return the dtype of the parameter's ``exp_avg`` as it is stored; the arguments are those of ``moment_format``."""
    format = moment_format(parameter, group, whole)
    if format is not None:
        return format.dtype
    if isinstance(group["exp_avg_dtype"], str):  # the parameter is too small to quantise
        return second_moment_dtype(parameter)
    return group["exp_avg_dtype"] or parameter.dtype


def rounding_of(parameter: Tensor, group: Mapping[str, Any]) -> str | None:
    """Return the group's ``bf16_rounding`` for a bf16 parameter, and None for a parameter of any other dtype."""
    return group["bf16_rounding"] if parameter.dtype == torch.bfloat16 else None
