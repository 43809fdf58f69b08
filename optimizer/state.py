"""The optimizer's state of one parameter: what is kept, in which dtype, and how much it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .partition.layout import Layout
from .update import second_moment_dtype


def moment_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the parameter's first moment under its group's options."""
    return group["exp_avg_dtype"] or parameter.dtype


def new_state(parameter: Tensor, layout: Layout, group: Mapping[str, Any]) -> dict[str, Any]:
    """State before the first step.

    The step counter lives beside the parameter where no engine may wait for the device, as in torch.
    """
    beside = group["capturable"] or group["fused"]
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if beside else "cpu"),
        "exp_avg": torch.zeros_like(
            parameter, dtype=moment_dtype(parameter, group), memory_format=torch.preserve_format, requires_grad=False
        ),
        "exp_avg_sq": torch.zeros(
            layout.aligned_shape(parameter.shape), dtype=second_moment_dtype(parameter), device=parameter.device
        ),
    }


def state_bytes(parameter: Tensor, layout: Layout, group: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by kind, whether the state exists yet or not."""
    return {
        "exp_avg": parameter.numel() * moment_dtype(parameter, group).itemsize,
        "exp_avg_sq": math.prod(layout.aligned_shape(parameter.shape)) * second_moment_dtype(parameter).itemsize,
        "step": torch.float32.itemsize,
    }
