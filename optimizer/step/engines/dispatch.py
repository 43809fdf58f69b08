"""Which engine takes which tensor of a step; everything is checked before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...partition.layout import Layout
from ..dtypes import rounding_of
from ..hyper import Hyper
from ..labels import label
from ..update import adam_mini_update
from . import native, triton
from .checks import require_takeable
from .foreach import foreach_update
from .rounded import rounded_update
from .traced import traced_update


class Item(NamedTuple):
    """One tensor of a step: its position in its group, the seed of its roundings, and what moves."""

    position: int
    seed: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    layout: Layout


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
        only: Sequence[int] | None = None,
    ) -> Work:
        """Check one group, or its parameters at positions ``only``.

        Raises:
            RuntimeError: a tensor that no engine takes (``checks.require_takeable``).
            ValueError: a parameter whose shape no longer fits its layout.
            AssertionError: flags that torch refuses at a step.
        """
        parameters = group["params"]
        ready = self._ready.setdefault(g, [])
        ready += [None] * (len(layouts) - len(ready))  # parameters may be sharded after the first look
        if group["foreach"] and group["differentiable"]:
            raise AssertionError("foreach=True keeps no graph; use foreach=None with differentiable=True")
        usable = _may_fuse(group) and native.available()
        last = self._batches.get(g) if usable and only is None else None
        if last is not None and last.takes(parameters, [p.grad for p in parameters], states):
            work, rest = Work(g, group, layouts, last, []), last.others
        else:
            work, rest = Work(g, group, layouts, native.Batches(len(layouts)), []), list(range(len(layouts)))
            if only is None:
                self._batches[g] = work.batches
        for i in rest if only is None else only:
            parameter = parameters[i]
            grad = parameter.grad
            if grad is None:
                continue
            known = ready[i]
            if usable and known is not None and known.takes(parameter, grad, states.get(parameter, {})):
                work.batches.add(known, parameter, grad, i)
                continue
            where = label(group, g, i)
            require_takeable(parameter, grad, states.get(parameter) or {}, group, where)
            layouts[i].require(parameter.shape, where)
            work.others.append(i)
        return work

    def step(self, work: Work, hyper: Hyper, state_of: Callable[[int, int], dict[str, Any]]) -> None:
        """Let each engine take its own; ``state_of(g, i)`` gives a parameter's state, made if need be."""
        params = work.group["params"]
        items = [
            Item(i, seed_of(work.g, i), params[i], params[i].grad, state_of(work.g, i), work.layouts[i])
            for i in work.others
        ]
        ready = self._ready[work.g]
        for i, taken in zip(work.others, run(items, work.group, hyper, work.batches), strict=True):
            ready[i] = taken


def run(
    items: Sequence[Item], group: Mapping[str, Any], hyper: Hyper, batches: native.Batches | None = None
) -> list[native.Ready | None]:
    """Step checked tensors of one group, and those already in ``batches``.

    Returns:
        For each item what the native loop can be told again next time, or None where another engine took it.
    """
    batches = native.Batches(len(items)) if batches is None else batches
    usable = _may_fuse(group) and native.available()
    taken = [_prepared(item, group) if usable else None for item in items]
    batched, on_cuda = [], []
    for item, ready in zip(items, taken, strict=True):
        if ready is not None:
            batches.add(ready, item.param, item.grad, item.position)
        elif _rounds(item, group):
            _eager(item, group, hyper)
        elif _may_fuse(group) and triton.available() and _fits_triton(item):
            on_cuda.append(item)
        elif _batches(group, item.param):
            batched.append(item)
        elif group["differentiable"] or group["capturable"]:
            _traced(item, hyper, differentiable=group["differentiable"])
        else:
            _eager(item, group, hyper)
    for update, tensors in ((triton.triton_update, on_cuda), (foreach_update, batched)):
        if tensors:
            _listed(update, tensors, hyper, capturable=group["capturable"])
    if len(batches):
        scale = 1.0 if hyper.grad_scale is None else float(hyper.grad_scale)
        batches.step(**hyper.numbers(), grad_scale=scale)
    return taken


def seed_of(g: int, i: int) -> int:
    """The seed of a tensor's roundings, uint32: of its place in the groups, so that runs repeat and resume."""
    return (g * 0x9E3779B1 + i * 0x85EBCA77) & 0xFFFFFFFF


def _prepared(item: Item, group: Mapping[str, Any]) -> native.Ready | None:
    rounding = rounding_of(item.param, group)
    return native.prepare(item.param, item.grad, item.state, item.layout, seed=item.seed, rounding=rounding)


def _may_fuse(group: Mapping[str, Any]) -> bool:
    """Whether the flags allow a fused engine, as torch reads them: an explicit foreach decides against one."""
    return not group["differentiable"] and (group["fused"] or (group["fused"] is None and group["foreach"] is None))


def _batches(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether the foreach engine takes the parameter: when asked for, or by default where launches cost more."""
    default = group["foreach"] is None and group["fused"] is None and parameter.device.type == "cuda"
    return (group["foreach"] or default) and not group["differentiable"]


def _traced(item: Item, hyper: Hyper, *, differentiable: bool) -> None:
    param, grad, state, layout = item[2:]
    traced_update(
        param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], layout, hyper, differentiable=differentiable
    )


def _rounds(item: Item, group: Mapping[str, Any]) -> bool:
    """Whether rounding is part of the step, which besides the native loop only the eager engine does."""
    return "exp_avg_scale" in item.state or rounding_of(item.param, group) is not None


def _eager(item: Item, group: Mapping[str, Any], hyper: Hyper) -> None:
    param, grad, state, layout = item[2:]
    if hyper.grad_scale is not None:
        grad = grad / hyper.grad_scale
    state["step"] += 1
    if _rounds(item, group):
        rounded_update(param, grad, state, layout, hyper, seed=item.seed, rounding=rounding_of(param, group))
        return
    first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
    adam_mini_update(param, grad, first, second, layout, step=step, **(hyper.numbers() | {"lr": hyper.lr}))


def _fits_triton(item: Item) -> bool:
    return triton.accepts(item.param, item.grad, item.state["exp_avg"], item.state["exp_avg_sq"])


def _listed(update: Callable[..., None], tensors: Sequence[Item], hyper: Hyper, *, capturable: bool) -> None:
    """Let an engine take lists of tensors."""
    params, grads, states, layouts = (list(column) for column in list(zip(*tensors, strict=True))[2:])
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    update(
        params, grads, first, second, steps, layouts, lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps,
        weight_decay=hyper.weight_decay, maximize=hyper.maximize, capturable=capturable, grad_scale=hyper.grad_scale,
        found_inf=hyper.found_inf,
    )  # fmt: skip
