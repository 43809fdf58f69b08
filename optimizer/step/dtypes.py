"""The dtypes of a step: what each state tensor of a parameter is kept in, under its group's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import moments


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """Of ``exp_avg_sq`` and of every sum of squares: fp32, or float64 for float64 parameters.

    A bf16 second moment would never decay: 0.999 of it rounds to itself.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def moment_format(parameter: Tensor, group: Mapping[str, Any]) -> moments.Format | None:
    """How the parameter's first moment is quantised; None where it is not."""
    dtype = group["exp_avg_dtype"]
    return moments.FORMATS[dtype] if isinstance(dtype, str) and moments.quantises(parameter.shape) else None


def moment_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Of the parameter's ``exp_avg``."""
    kept = moment_format(parameter, group)
    if kept is not None:
        return kept.dtype
    if isinstance(group["exp_avg_dtype"], str):  # too small to quantise
        return second_moment_dtype(parameter)
    return group["exp_avg_dtype"] or parameter.dtype


def rounding_of(parameter: Tensor, group: Mapping[str, Any]) -> str | None:
    """How the parameter is rounded after a step: a choice for bf16 ones alone."""
    return group["bf16_rounding"] if parameter.dtype == torch.bfloat16 else None
