"""Which engine takes which tensor of a step; everything is checked before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..groups import describe
from ..hyper import Hyper
from ..partition.layout import Layout
from ..state import moment_dtype
from ..update import adam_mini_update
from . import native
from .traced import traced_update

_CAPTURABLE = ("cuda", "xpu", "hpu", "xla")
"""Devices on which torch's own optimizers take ``capturable=True``."""


@dataclass
class Work:
    """One group's part of a step: what the native loop takes as it took it last time, and the indices of the rest."""

    g: int
    group: dict[str, Any]
    layouts: list[Layout]
    batches: native.Batches
    others: list[int]


class Engines:
    """The engines of one optimizer, with what they remember of its tensors from step to step."""

    def __init__(self) -> None:
        self._ready: dict[int, list[native.Ready | None]] = {}  # by group position
        self._batches: dict[int, native.Batches] = {}  # likewise: what the native loop took in the last step

    def forget(self) -> None:
        """Layouts or state were replaced: look everything up again."""
        self._ready.clear()
        self._batches.clear()

    def prepare(
        self,
        g: int,
        group: dict[str, Any],
        layouts: list[Layout],
        states: Mapping[Tensor, Any],
        only: int | None = None,
    ) -> Work:
        """Check one group, or its parameter at position ``only``.

        Raises:
            RuntimeError: a sparse or complex gradient, one of another dtype or device, state of another dtype or
                device, or ``fused=True`` for a tensor that no fused engine takes.
            ValueError: a parameter whose shape no longer fits its layout.
            AssertionError: ``capturable=True`` on a device that cannot capture, or ``foreach=True`` with
                ``differentiable=True``, as in torch.
        """
        parameters = group["params"]
        grads = [parameter.grad for parameter in parameters] if only is None else []
        if group["foreach"] and group["differentiable"]:
            raise AssertionError("foreach=True keeps no graph; use foreach=None with differentiable=True")
        usable = _may_fuse(group) and not torch.compiler.is_compiling() and native.available()
        ready = self._ready.setdefault(g, [None] * len(layouts))
        last = self._batches.get(g) if usable and only is None else None
        if last is not None and last.takes(parameters, grads, states):
            work, rest = Work(g, group, layouts, last, []), last.others
        else:
            work, rest = Work(g, group, layouts, native.Batches(len(layouts)), []), list(range(len(layouts)))
            if only is None:
                self._batches[g] = work.batches
        for i in rest if only is None else (only,):
            parameter = parameters[i]
            grad = parameter.grad
            if grad is None:
                continue
            known = ready[i]
            if usable and known is not None and known.takes(parameter, grad, states.get(parameter, {})):
                work.batches.add(known, parameter, grad, i)
                continue
            where = describe(group, g, i)
            require_steppable(parameter, grad, where)
            layouts[i].require(parameter.shape, where)
            state = states.get(parameter) or {}
            _require_own(parameter, state, group, where)
            if group["capturable"] and not torch.compiler.is_compiling():
                _require_capturable(parameter, state, where)
            if group["fused"]:
                _require_fused(parameter, grad, state, where)
            work.others.append(i)
        return work

    def step(self, work: Work, hyper: Hyper, state_of: Callable[[int, int], dict[str, Any]]) -> None:
        """Let each engine take its own; ``state_of(g, i)`` gives a parameter's state, made if need be."""
        group, ready = work.group, self._ready[work.g]
        batched: list[tuple[Tensor, Tensor, dict[str, Any], Layout]] = []
        compiling = torch.compiler.is_compiling()
        for i in work.others:
            parameter, grad, layout = group["params"][i], group["params"][i].grad, work.layouts[i]
            state = state_of(work.g, i)
            if _may_fuse(group) and not compiling and native.available():
                taken = ready[i] = native.prepare(parameter, grad, state, layout)
                if taken is not None:
                    work.batches.add(taken, parameter, grad, i)
                    continue
            if _batches(group, parameter) and not compiling:
                batched.append((parameter, grad, state, layout))
            elif compiling or group["differentiable"] or group["capturable"]:
                traced_update(
                    parameter, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], layout, hyper,
                    differentiable=group["differentiable"],
                )  # fmt: skip
            else:
                _eager(parameter, grad, state, layout, hyper)
        if batched:
            _foreach(batched, hyper, capturable=group["capturable"])
        if len(work.batches):
            scale = 1.0 if hyper.grad_scale is None else float(hyper.grad_scale)
            work.batches.step(**hyper.numbers(), grad_scale=scale)


def _may_fuse(group: Mapping[str, Any]) -> bool:
    """Whether the flags allow a fused engine, as torch reads them: an explicit foreach decides against one."""
    return not group["differentiable"] and (group["fused"] or (group["fused"] is None and group["foreach"] is None))


def _batches(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether the foreach engine takes the parameter: when asked for, or by default where launches cost more."""
    default = group["foreach"] is None and group["fused"] is None and parameter.device.type == "cuda"
    return (group["foreach"] or default) and not group["differentiable"]


def _eager(parameter: Tensor, grad: Tensor, state: dict[str, Any], layout: Layout, hyper: Hyper) -> None:
    if hyper.grad_scale is not None:
        grad = grad / hyper.grad_scale
    state["step"] += 1
    numbers = hyper.numbers() | {"lr": hyper.lr}
    adam_mini_update(
        parameter, grad, state["exp_avg"], state["exp_avg_sq"], layout, step=state["step"].item(), **numbers
    )


def _foreach(batched: list[tuple[Tensor, Tensor, dict[str, Any], Layout]], hyper: Hyper, *, capturable: bool) -> None:
    for parameter, grad, state, layout in batched:
        traced_update(parameter, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], layout, hyper)


def require_steppable(parameter: Tensor, grad: Tensor, where: str) -> None:
    """Raise RuntimeError for a gradient that no engine can take."""
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{where} has a sparse gradient; use a dense one (nn.Embedding(sparse=False))")
    if parameter.is_complex() or grad.is_complex():
        raise RuntimeError(f"{where} is complex; give the optimizer torch.view_as_real of it")
    if grad.device != parameter.device:
        raise RuntimeError(
            f"{where} is on {parameter.device}, its gradient on {grad.device}; move the model before the backward pass"
        )
    if not grad.is_floating_point():
        raise RuntimeError(f"{where} has a gradient of dtype {grad.dtype}; only floating-point ones can be stepped")
    if grad.dtype != parameter.dtype and getattr(parameter, "grad_dtype", parameter.dtype) not in (None, grad.dtype):
        raise RuntimeError(
            f"{where} has dtype {parameter.dtype}, its gradient {grad.dtype}; clear the gradient after changing the "
            "model's dtype, or set the parameter's grad_dtype"
        )


def _require_own(parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    """Raise RuntimeError where the state was made for another dtype or device than the parameter has now."""
    if "exp_avg" not in state:
        return
    moment, wanted = state["exp_avg"], moment_dtype(parameter, group)
    if moment.device != parameter.device or moment.dtype != wanted or moment.shape[:-1] != parameter.shape[:-1]:
        raise RuntimeError(
            f"{where} is now {parameter.dtype} on {parameter.device} and needs a first moment of {wanted} there, but "
            f"its state holds {moment.dtype} on {moment.device}; optimizer.load_state_dict(optimizer.state_dict()) "
            "carries the state over"
        )


def _require_capturable(parameter: Tensor, state: Mapping[str, Any], where: str) -> None:
    step = state.get("step")
    if parameter.device.type not in _CAPTURABLE or (step is not None and step.device != parameter.device):
        raise AssertionError(
            f"capturable=True needs parameters and step counters on one of {', '.join(_CAPTURABLE)}; {where} is on "
            f"{parameter.device}" + ("" if step is None else f", its counter on {step.device}")
        )


def _require_fused(parameter: Tensor, grad: Tensor, state: Mapping[str, Any], where: str) -> None:
    """Raise RuntimeError where ``fused=True`` was asked for and cannot be given."""
    if torch.compiler.is_compiling():
        return
    if not native.available():
        raise RuntimeError("fused=True, but the native step cannot be built here (see the log); use fused=None")
    reason = native.obstacle(parameter, grad, state)
    if reason is not None:
        raise RuntimeError(f"fused=True, but no fused engine takes {where} and its gradient: {reason}; use fused=None")
