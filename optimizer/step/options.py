"""Checks of the optimizer's hyper-parameters and flags: their ranges, and the combinations that torch also allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOW_BIT = ("int8", "int4")
"""Values of ``exp_avg_dtype`` that store first moments as codes with one scale per block."""
ROUNDINGS = (None, "stochastic", "kahan")
"""Values of ``bf16_rounding``; None rounds to nearest."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "foreach": (None, True, False),
    "fused": (None, True, False),
    "capturable": (True, False),
    "differentiable": (True, False),
    "maximize": (True, False),
    "bf16_rounding": ROUNDINGS,
}


def validate(options: Mapping[str, Any], what: str) -> None:
    """Check one complete set of options, defaults included.

    Args:
        options: the constructor's arguments, or the options of one parameter group.
        what: the words that error messages begin with, for example "argument".

    Raises:
        ValueError: a number is out of range or not finite, a tensor has more than one element, a dtype or flag is
            unknown, or lr or betas are tensors with ``foreach=True`` and without ``capturable=True``, as in torch.
        RuntimeError: ``fused=True`` is combined with ``foreach=True`` or ``differentiable=True``, as in torch, or
            ``differentiable=True`` with a quantised first moment or with ``bf16_rounding``.
    """
    for name in ("lr", "eps", "weight_decay"):
        _require_number(options[name], f"{what} {name}")
    _validate_betas(options["betas"], what)
    for name, allowed in _ALLOWED.items():
        if not any(options[name] is value or options[name] == value for value in allowed):
            raise ValueError(f"{what} {name}={options[name]!r} must be one of {', '.join(map(repr, allowed))}")
    _validate_moment(options["exp_avg_dtype"], what)
    _validate_flags(options, what)


def _require_number(value: Any, what: str, below: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is a finite number in [0, below), or a tensor of one such number."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} must be one number; got a tensor of shape {tuple(value.shape)}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading the value would wait for the device
        value = value.item()
    elif getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a NumPy array without dimensions
    if not isinstance(value, Real) or not math.isfinite(value) or not 0 <= float(value) < below:
        raise ValueError(
            f"{what}={value!r} must be " + ("a finite number >= 0" if below == math.inf else f"in [0, {below:g})")
        )


def _validate_betas(betas: Any, what: str) -> None:
    """Raise ValueError unless ``betas`` are two numbers, or two one-element tensors, in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{what} betas={betas!r} must be two numbers, for example (0.9, 0.95)")
    if isinstance(betas[0], Tensor) is not isinstance(betas[1], Tensor):
        raise ValueError(f"{what} betas={betas!r} must be two numbers or two tensors, not one of each")
    for i, beta in enumerate(betas):
        _require_number(beta, f"{what} betas[{i}]", below=1)


def _validate_moment(dtype: Any, what: str) -> None:
    """Raise ValueError unless ``dtype`` is a value that ``exp_avg_dtype`` may have."""
    if dtype is None or (isinstance(dtype, str) and dtype in LOW_BIT):
        return
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2):
        raise ValueError(
            f"{what} exp_avg_dtype={dtype!r} must be None, 'int8', 'int4', or a dtype such as torch.float32 or "
            "torch.bfloat16"
        )


def _validate_flags(options: Mapping[str, Any], what: str) -> None:
    """Raise for combinations of flags that torch refuses at construction, with the type of error that torch raises."""
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
                raise ValueError(f"{what} {name} is a tensor; with foreach=True, also set capturable=True")
