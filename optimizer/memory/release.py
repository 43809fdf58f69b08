"""Optimizer in backward: a parameter is stepped and its gradient is freed as soon as the gradient is complete."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from ..adam_mini import AdamMini
from ..step.labels import label

_RELEASED: weakref.WeakSet[AdamMini] = weakref.WeakSet()


def reduced_later(parameter: Tensor) -> bool:
    """Return whether a gradient that autograd has completed may still have to be reduced over processes.

    DDP and FSDP1 reduce the gradients of plain tensors after accumulation and do not mark those tensors. FSDP2 sets the
    gradient of a DTensor only after it is reduced.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return not hasattr(parameter, "placements")


def without_owning(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook that calls a method but does not keep its object alive.

    A strong reference would be a cycle through the tensor's hooks, which Python never collects.
    """
    reference = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        if (bound := reference()) is not None:
            bound(parameter)

    return hook


class GradientRelease:
    """The hooks that ``gradient_release`` registers on an optimizer's parameters."""

    def __init__(self, optimizer: AdamMini) -> None:
        if not isinstance(optimizer, AdamMini):
            kind = type(optimizer).__name__
            raise TypeError(
                f"argument optimizer={kind} cannot step one parameter alone; give gradient_release an AdamMini"
                + (", or train with CPUOffload(offload_gradients=True)" if kind == "CPUOffload" else "")
            )
        if optimizer in _RELEASED:
            raise RuntimeError("this optimizer's gradients are released already; call remove() on the first release")
        if any(group["differentiable"] for group in optimizer.param_groups):
            raise ValueError(
                "differentiable=True needs gradients after the backward pass; build the optimizer with "
                "differentiable=False"
            )
        self.optimizer = optimizer
        self._positions: dict[Tensor, tuple[int, int]] = {}
        self._handles: dict[Tensor, Any] = {}
        self._stepped: set[Tensor] = set()
        self._accumulating = 0  # open ``accumulate`` contexts
        self._follow()
        self._before = optimizer.register_step_pre_hook(self._before_step)  # this keeps the release alive
        _RELEASED.add(optimizer)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Open a context in which backward passes only accumulate into ``p.grad``.

        Use it for all backward passes of a gradient accumulation except the last one.
        """
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Remove the hooks, so that the optimizer steps in ``step()`` again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._before.remove()
        _RELEASED.discard(self.optimizer)

    def _follow(self) -> None:
        """Register hooks on new and newly trainable parameters, and remove those of parameters that left the groups."""
        groups = self.optimizer.param_groups
        self._positions = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        for removed in self._handles.keys() - self._positions.keys():
            self._handles.pop(removed).remove()
        for parameter in self._positions:
            if parameter.requires_grad and parameter not in self._handles:
                self._require_reduced(parameter)
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(without_owning(self._step))

    def _require_reduced(self, parameter: Tensor) -> None:
        """Raise RuntimeError if the gradient may still have to be reduced over processes."""
        if reduced_later(parameter):
            raise RuntimeError(
                f"gradient release steps before gradients are reduced over {distributed.get_world_size()} processes "
                "(DDP, FSDP1), so ranks would drift apart; use FSDP2 (fully_shard), or step() without release"
            )

    @torch.no_grad()
    def _step(self, parameter: Tensor) -> None:
        """Step one parameter from within the backward pass, and free its gradient."""
        if self._accumulating or parameter.grad is None:
            return
        g, i = self._positions[parameter]
        group = self.optimizer.param_groups[g]
        if i >= len(group["params"]) or group["params"][i] is not parameter:  # groups were edited since the last step
            self._follow()
            if parameter not in self._positions:
                return
            g, i = self._positions[parameter]
        if parameter in self._stepped:
            raise RuntimeError(
                f"{label(self.optimizer.param_groups[g], g, i)} got a second gradient since the last "
                "optimizer.step(): call step() after every backward pass, wrap all backward passes of an accumulation "
                "but the last in release.accumulate(), and checkpoint shared weights with use_reentrant=False"
            )
        self._require_reduced(parameter)
        self.optimizer.step_parameter(g, i)
        self._stepped.add(parameter)
        parameter.grad = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """End an iteration: forget which parameters were stepped, and follow changes of the groups."""
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "a GradScaler unscales gradients after the backward pass, but released gradients are gone by then; "
                "train in bf16 without a scaler, or call release.remove()"
            )
        self._stepped.clear()
        self._follow()


def gradient_release(optimizer: AdamMini) -> GradientRelease:
    """Step every parameter inside the backward pass and free its gradient at once.

    Memory peaks with one gradient at a time instead of all of them. The result equals ``backward(); step()`` bit for
    bit. Keep calling ``step()`` after every backward pass. It ends the iteration (hooks, schedulers, closures), steps
    parameters that were added or unfrozen since the last call, and lets the release distinguish a second, undeclared
    backward pass from a new iteration. Learning rates and options are read from the groups when a gradient arrives.

    Methods that need all gradients at once do not work. ``clip_grad_norm_`` finds no gradients and does nothing. A
    ``GradScaler`` is refused at its first ``step``, after one unusable iteration. DDP and FSDP1 are refused because
    they reduce gradients later. If a hook raises an error (for a sparse gradient, for example), the parameters before
    it have already been stepped.

    Args:
        optimizer: the optimizer whose parameters are stepped in the backward pass, until ``remove()`` is called.

    Returns:
        The release, with ``accumulate()`` for gradient accumulation and ``remove()`` to undo it.

    Raises:
        TypeError: the optimizer is no AdamMini.
        RuntimeError: the optimizer's gradients are released already, or there are several processes and parameters
            that are no DTensors.
        ValueError: the optimizer has ``differentiable=True``.

    Example:
        >>> release = gradient_release(optimizer)
        >>> with release.accumulate():
        ...     loss(first).backward()
        >>> loss(second).backward()  # steps
        >>> optimizer.step()
    """
    return GradientRelease(optimizer)
