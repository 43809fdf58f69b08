"""Checks that refuse tensors and flags that no engine supports, before any tensor is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...partition.factored import TensorLayout
from ..dtypes import moment_dtype, moment_format, rounding_of
from . import native, triton

_CAPTURABLE = ("cuda", "xpu", "hpu", "xla")
"""Types of devices on which torch's own optimizers allow ``capturable=True``."""


def require_takeable(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    where: str,
    layout: TensorLayout | None = None,
    whole: Sequence[int] | None = None,
) -> None:
    """Check one parameter, its gradient and its state before a step.

    Args:
        parameter: the parameter to step.
        grad: its gradient.
        state: its state, empty before the first step.
        group: the options of its group.
        where: the parameter in words, for messages.
        layout: its layout; only ``fused=True`` needs it, and only if the second moment is factored.
        whole: shape of the whole parameter, if this is a shard of it.

    Raises:
        RuntimeError: the gradient is sparse, complex, or of another dtype or device than the parameter; the state is of
            another dtype or device; no fused engine supports the tensors and ``fused=True``; or lr is a tensor with
            ``foreach=True`` and without ``capturable=True``.
        AssertionError: ``capturable=True`` on a device that does not support capture, as in torch.
    """
    require_steppable(parameter, grad, where)
    _require_matching_state(parameter, state, group, where, whole)
    if group["foreach"] and not group["capturable"] and isinstance(group["lr"], Tensor):
        raise RuntimeError(f"the lr of {where} is a tensor; with foreach=True, also set capturable=True")
    if group["capturable"] and not group["fused"] and not torch.compiler.is_compiling():
        _require_capturable(parameter, state, where)
    if group["fused"]:
        _require_fused(parameter, grad, state, group, where, layout, whole)


def require_steppable(parameter: Tensor, grad: Tensor, where: str) -> None:
    """Raise RuntimeError for a gradient that no engine supports."""
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{where} has a sparse gradient; use a dense one (nn.Embedding(sparse=False))")
    if parameter.is_complex() or grad.is_complex():
        raise RuntimeError(f"{where} is complex; pass torch.view_as_real of it to the optimizer")
    if grad.device != parameter.device:
        raise RuntimeError(
            f"{where} is on {parameter.device} and its gradient on {grad.device}; move the model before the backward "
            "pass"
        )
    if not grad.is_floating_point():
        raise RuntimeError(f"{where} has a gradient of dtype {grad.dtype}; use a floating-point dtype")
    if grad.dtype != parameter.dtype and getattr(parameter, "grad_dtype", parameter.dtype) not in (None, grad.dtype):
        raise RuntimeError(
            f"{where} has dtype {parameter.dtype} and its gradient {grad.dtype}; clear the gradient after changing the "
            "model's dtype, or set the parameter's grad_dtype"
        )


def _require_matching_state(
    parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], where: str, whole: Sequence[int] | None
) -> None:
    """Raise RuntimeError if the state was created for another dtype or device than the parameter has now."""
    if "exp_avg" not in state:
        return
    moment, wanted = state["exp_avg"], moment_dtype(parameter, group, whole)
    if moment.device != parameter.device or moment.dtype != wanted:
        raise RuntimeError(
            f"{where} is now {parameter.dtype} on {parameter.device} and needs exp_avg in {wanted} there, but its "
            f"exp_avg is {moment.dtype} on {moment.device}; convert the state with "
            "optimizer.load_state_dict(optimizer.state_dict())"
        )


def _require_capturable(parameter: Tensor, state: Mapping[str, Any], where: str) -> None:
    """Raise AssertionError, as torch does, unless the parameter and its counter are on a device that can capture."""
    step = state.get("step")
    if parameter.device.type not in _CAPTURABLE or (step is not None and step.device != parameter.device):
        raise AssertionError(
            f"capturable=True needs parameters and step counters on one of {', '.join(_CAPTURABLE)}; {where} is on "
            f"{parameter.device}" + ("" if step is None else f", its counter on {step.device}")
        )


def _require_fused(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    where: str,
    layout: TensorLayout | None,
    whole: Sequence[int] | None,
) -> None:
    """Raise RuntimeError if no fused engine supports the tensors, although ``fused=True``."""
    if parameter.device.type == "cuda":
        if moment_format(parameter, group, whole) is not None or rounding_of(parameter, group) is not None:
            reason: str | None = (
                f"the Triton kernels neither quantise (exp_avg_dtype={group['exp_avg_dtype']}) nor round specially "
                f"(bf16_rounding={group['bf16_rounding']})"
            )
        elif not triton.available():
            reason = "Triton is not installed"
        else:
            second = state.get("exp_avg_sq", torch.zeros((), device=parameter.device))
            first = state.get("exp_avg", parameter)
            reason = triton.obstacle(parameter, grad, first, second, state.get("exp_avg_sq_col"))
        if reason is None:
            return
        raise RuntimeError(f"fused=True, but no fused engine supports {where} on CUDA: {reason}; use fused=None")
    if not native.available():
        raise RuntimeError("fused=True, but the native step cannot be built here (see the log); use fused=None")
    reason = native.obstacle(
        parameter,
        grad,
        state,
        layout=layout,
        rounding=rounding_of(parameter, group),
        low_bit=moment_format(parameter, group, whole) is not None,
    )
    if reason is not None:
        raise RuntimeError(
            f"fused=True, but no fused engine supports {where} and its gradient: {reason}; use fused=None"
        )
