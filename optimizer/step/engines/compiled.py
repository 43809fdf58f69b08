"""The step as a torch operator, which a compiled ``optimizer.step`` calls once per group.

Inside the operator, the dispatch to engines is the same as without a compiler. The operator receives a handle of the
optimizer and reads the hyper-parameters (lr, betas, ...) from the optimizer when it runs. So the graph contains none of
them, and changing one causes no recompilation.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ...partition.factored import TensorLayout
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
    """Return a handle by which compiled code finds the optimizer; it is valid as long as the optimizer exists.

    The handle is a string, because a compiler treats a number that differs between optimizers as a variable.
    """
    handle = str(next(_NUMBERS))
    _LIVE[handle] = optimizer
    return handle


def traced_step(optimizer: Stepper, handle: str) -> None:
    """Take a step while a compiler traces it: one call of the operator per group."""
    _make_state(handle)
    # The attributes are read through __dict__, because the compiler would otherwise guard the value of every option of
    # every group. All gradients are read before any state, because the compiler guards the identity of the gradient of
    # a parameter that it meets first as a key of the state.
    groups, state = optimizer.__dict__["param_groups"], optimizer.__dict__["state"]
    positions = [[i for i, p in enumerate(group["params"]) if p.grad is not None] for group in groups]
    params = [[group["params"][i] for i in indices] for group, indices in zip(groups, positions, strict=True)]
    grads = [[p.grad for p in group_params] for group_params in params]
    if any(type(p) is not torch.nn.Parameter for group_params in params for p in group_params) or _flattened(handle):
        # Tensor subclasses such as DTensor dispatch operators in their own way, and ranks may share blocks of flattened
        # parameters, so that they have to communicate.
        _uncompiled(optimizer)
        return
    for g in range(len(groups)):
        if params[g]:
            states = [state[p][name] for p in params[g] for name in sorted(state[p])]
            torch.ops.adam_mini.step_(params[g], grads[g], states, handle, g, positions[g])


@_disable_dynamo
def _uncompiled(optimizer: Stepper) -> None:
    """Take the step outside the graph."""
    optimizer.step_all()


def _flattened(handle: str) -> bool:
    """Whether a parameter has a layout of flattened tensors, which the operator does not support."""
    return any(not isinstance(layout, TensorLayout) for layouts in _LIVE[handle].layouts for layout in layouts)


def _make_state(handle: str) -> bool:
    """Create the state while the step is traced, so that the graph of the first step is valid for later steps."""
    _LIVE[handle].init_state()
    return True


# This is what torch._dynamo.assume_constant_result does. Setting the attribute avoids importing the compiler, which
# would also import Triton.
_make_state._dynamo_marked_constant = _flattened._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: str, group: int, positions: list[int]
) -> None:
    """Implement the operator: step the tensors of one group as the optimizer of the handle is configured.

    Args:
        params: parameters of the group that have a gradient; changed.
        grads: their gradients.
        states: state tensors of all the parameters, in order, each parameter's sorted by name; changed.
        handle: the optimizer's handle.
        group: index of the group.
        positions: positions of the parameters in the group.

    Raises:
        RuntimeError: the optimizer no longer exists, or no engine supports a tensor.
    """
    optimizer = _LIVE.get(handle)
    if optimizer is None:
        raise RuntimeError(
            "the optimizer of this compiled step no longer exists; compile the step of the optimizer in use"
        )
    options, remaining_states = optimizer.param_groups[group], iter(states)
    items = []
    for i, param, grad in zip(positions, params, grads, strict=True):
        names = sorted(optimizer.state[options["params"][i]])
        state: dict[str, Any] = {name: next(remaining_states) for name in names}
        layout = optimizer.layouts[group][i]
        assert isinstance(layout, TensorLayout)  # parameters with other layouts are not traced
        require_takeable(param, grad, state, options, label(options, group, i), layout)
        items.append(Item(i, seed_of(group, i), param, grad, state, layout))
    if not optimizer.skips():
        run(items, options, optimizer.numbers(options))


_LIBRARY.impl("step_", _step, "CompositeExplicitAutograd")
torch.library.register_fake("adam_mini::step_", lambda *arguments: None, lib=_LIBRARY)
