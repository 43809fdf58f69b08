"""The step as a torch operator, which a compiled ``optimizer.step`` calls whole.

Inside, the engines choose as they do outside a compiler. The numbers of the step (lr, betas, ...) are read when the
operator runs, from the live optimizer behind a handle: a graph holds none of them, so no change of one compiles anew.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ...partition.layout import Layout
from ..labels import label
from .checks import require_takeable
from .dispatch import Item, run, seed_of

if TYPE_CHECKING:
    from ...interface import Stepper

_NUMBERS = itertools.count(1)
_LIVE: weakref.WeakValueDictionary[str, Stepper] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("adam_mini", "FRAGMENT")
_LIBRARY.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, str handle, int group, int[] positions) -> ()"
)


def register(optimizer: Stepper) -> str:
    """A handle under which compiled code finds the optimizer again, for as long as it lives.

    A string, because a compiler takes a number that differs from one optimizer to the next for a variable.
    """
    handle = str(next(_NUMBERS))
    _LIVE[handle] = optimizer
    return handle


def traced_step(optimizer: Stepper, handle: str) -> None:
    """What a compiler sees of a step: one operator per group."""
    _make_state(handle)
    # Through __dict__: a compiler that sees these attributes themselves guards the value of every option of every
    # group. And every gradient before any state: a parameter first met as a key of the state has its gradient's
    # identity guarded.
    groups, state = optimizer.__dict__["param_groups"], optimizer.__dict__["state"]
    positions = [[i for i, p in enumerate(group["params"]) if p.grad is not None] for group in groups]
    params = [[group["params"][i] for i in own] for group, own in zip(groups, positions, strict=True)]
    grads = [[p.grad for p in own] for own in params]
    if any(type(p) is not torch.nn.Parameter for own in params for p in own) or _flattened(handle):
        _uncompiled(optimizer)  # tensor subclasses (DTensor) have rules of their own for operators; ranks may share
        return
    for g in range(len(groups)):
        if params[g]:
            states = [state[p][name] for p in params[g] for name in sorted(state[p])]
            torch.ops.adam_mini.step_(params[g], grads[g], states, handle, g, positions[g])


@_disable_dynamo
def _uncompiled(optimizer: Stepper) -> None:
    optimizer.step_all()


def _flattened(handle: str) -> bool:
    return any(type(layout) is not Layout for own in _LIVE[handle].layouts for layout in own)


def _make_state(handle: str) -> bool:
    """Create the state while the step is traced, so that the graph of the first step serves the later ones."""
    _LIVE[handle].init_state()
    return True


# What torch._dynamo.assume_constant_result does, without importing the compiler (and Triton with it) now.
_make_state._dynamo_marked_constant = _flattened._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: str, group: int, positions: list[int]
) -> None:
    """The operator: the tensors given are stepped, the optimizer behind the handle says how."""
    optimizer = _LIVE.get(handle)
    if optimizer is None:
        raise RuntimeError("a compiled step outlived its optimizer; compile the step of the optimizer in use")
    own, given = optimizer.param_groups[group], iter(states)
    items = []
    for i, param, grad in zip(positions, params, grads, strict=True):
        state: dict[str, Any] = {name: next(given) for name in sorted(optimizer.state[own["params"][i]])}
        require_takeable(param, grad, state, own, label(own, group, i))
        layout = optimizer.layouts[group][i]
        assert isinstance(layout, Layout)  # parameters with other layouts are not traced
        items.append(Item(i, seed_of(group, i), param, grad, state, layout))
    if not optimizer.skips():
        run(items, own, optimizer.numbers(own))


_LIBRARY.impl("step_", _step, "CompositeExplicitAutograd")
torch.library.register_fake("adam_mini::step_", lambda *arguments: None, lib=_LIBRARY)
