"""Hyper-parameters and flags of the optimizer: in range, and in combinations that torch's own optimizers take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOW_BIT = ("int8", "int4")
"""First moments kept as blockwise-scaled codes."""
ROUNDINGS = (None, "stochastic", "kahan")


def validate(options: Mapping[str, Any], what: str) -> None:
    """Check one set of options, defaults filled in.

    Args:
        options: the constructor's arguments, or a group's.
        what: whose they are, for messages.

    Raises:
        ValueError: a number out of range or not finite, a tensor of more than one element, an unknown dtype or flag,
            or a Tensor lr or betas where torch refuses one too (``foreach=True`` without ``capturable=True``).
        RuntimeError: ``fused=True`` with ``foreach=True`` or ``differentiable=True``, as in torch.
    """
    for name in ("lr", "eps", "weight_decay"):
        _require_number(options[name], f"{what} {name}")
    _validate_betas(options["betas"], what)
    for name, allowed in (("foreach", (None, True, False)), ("fused", (None, True, False)),
                          ("capturable", (True, False)), ("differentiable", (True, False)),
                          ("maximize", (True, False)), ("bf16_rounding", ROUNDINGS)):  # fmt: skip
        if not any(options[name] is value or options[name] == value for value in allowed):
            raise ValueError(f"{what} {name}={options[name]!r} must be one of {', '.join(map(repr, allowed))}")
    _validate_moment(options["exp_avg_dtype"], what)
    _validate_flags(options, what)


def _require_number(value: Any, what: str, below: float = math.inf) -> None:
    """A finite number in [0, below), or a one-element tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} must be one number; got a tensor of shape {tuple(value.shape)}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at it would wait for the device
        value = value.item()
    elif getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # an array of NumPy without dimensions
    if not isinstance(value, Real) or not math.isfinite(value) or not 0 <= float(value) < below:
        raise ValueError(
            f"{what}={value!r} must be " + ("a finite number >= 0" if below == math.inf else f"in [0, {below:g})")
        )


def _validate_betas(betas: Any, what: str) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{what} betas={betas!r} must be two numbers, for example (0.9, 0.95)")
    if isinstance(betas[0], Tensor) is not isinstance(betas[1], Tensor):
        raise ValueError(f"{what} betas={betas!r} must be two numbers or two tensors, not one of each")
    for i, beta in enumerate(betas):
        _require_number(beta, f"{what} betas[{i}]", below=1)


def _validate_moment(dtype: Any, what: str) -> None:
    if dtype is None or (isinstance(dtype, str) and dtype in LOW_BIT):
        return
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise ValueError(
            f"{what} exp_avg_dtype={dtype!r} must be None, 'int8', 'int4', or a dtype such as torch.float32 or "
            "torch.bfloat16"
        )


def _validate_flags(options: Mapping[str, Any], what: str) -> None:
    """Combinations that torch refuses when an optimizer is built, with the kinds of error it raises."""
    if options["fused"] and options["foreach"]:
        raise RuntimeError(f"{what} fused=True and foreach=True exclude each other; leave one of them None")
    if options["fused"] and options["differentiable"]:
        raise RuntimeError(f"{what} fused=True has no backward; use fused=None with differentiable=True")
    if options["differentiable"] and (options["exp_avg_dtype"] in LOW_BIT or options["bf16_rounding"]):
        raise RuntimeError(
            f"{what} differentiable=True cannot pass gradients through rounding: leave exp_avg_dtype="
            f"{options['exp_avg_dtype']!r} and bf16_rounding={options['bf16_rounding']!r} at None"
        )
    if options["foreach"] and not options["capturable"]:
        for name, value in (("lr", options["lr"]), ("betas", options["betas"][0])):
            if isinstance(value, Tensor):
                raise ValueError(f"{what} {name} is a tensor, which foreach=True takes only with capturable=True")
