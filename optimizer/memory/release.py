"""Optimizer in backward: a parameter is stepped, and its gradient freed, as soon as the gradient is whole."""

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
    """Whether other processes may still have to add to a gradient that autograd has finished with.

    DDP and FSDP1 reduce plain tensors after accumulation and leave no mark on them; FSDP2's DTensors are only given
    their gradient once it is reduced.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return not hasattr(parameter, "placements")


def without_owning(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that ends with its object: cycles through a tensor's hooks are never collected."""
    known = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        if (alive := known()) is not None:
            alive(parameter)

    return hook


class GradientRelease:
    """What ``gradient_release`` returns: the hooks on an optimizer's parameters."""

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
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._handles: dict[Tensor, Any] = {}
        self._stepped: set[Tensor] = set()
        self._waiting = 0
        self._follow()
        self._before = optimizer.register_step_pre_hook(self._before_step)  # and so the optimizer owns the release
        _RELEASED.add(optimizer)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within, backward passes only add to ``p.grad``: for all passes but the last one of an accumulation."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def remove(self) -> None:
        """Take the hooks away: the optimizer steps in ``step()`` again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._before.remove()
        _RELEASED.discard(self.optimizer)

    def _follow(self) -> None:
        """Hook what is new in the groups, or trainable now; unhook what has left them."""
        groups = self.optimizer.param_groups
        self._places = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        for gone in self._handles.keys() - self._places.keys():
            self._handles.pop(gone).remove()
        for parameter in self._places:
            if parameter.requires_grad and parameter not in self._handles:
                self._require_whole(parameter)
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(without_owning(self._take))

    def _require_whole(self, parameter: Tensor) -> None:
        if reduced_later(parameter):
            raise RuntimeError(
                f"gradient release steps before gradients are reduced over {distributed.get_world_size()} processes "
                "(DDP, FSDP1), so ranks would drift apart; use FSDP2 (fully_shard), or step() without release"
            )

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """One parameter's step, from within the backward pass."""
        if self._waiting or parameter.grad is None:
            return
        g, i = self._places[parameter]
        group = self.optimizer.param_groups[g]
        if i >= len(group["params"]) or group["params"][i] is not parameter:  # groups were edited since the last step
            self._follow()
            if parameter not in self._places:
                return
            g, i = self._places[parameter]
        if parameter in self._stepped:
            raise RuntimeError(
                f"{label(self.optimizer.param_groups[g], g, i)} got a second gradient since the last "
                "optimizer.step(): call step() after every backward pass, wrap all backward passes of an accumulation "
                "but the last in release.accumulate(), and checkpoint shared weights with use_reentrant=False"
            )
        self._require_whole(parameter)
        self.optimizer.step_parameter(g, i)
        self._stepped.add(parameter)
        parameter.grad = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """``step()`` closes one iteration; it takes parameters that were added since the last one in the usual way."""
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "a GradScaler unscales after the backward pass, when released gradients have been stepped with; train "
                "in bf16 without a scaler, or call release.remove()"
            )
        self._stepped.clear()
        self._follow()


def gradient_release(optimizer: AdamMini) -> GradientRelease:
    """Step every parameter inside the backward pass and free its gradient at once.

    The peak holds one gradient at a time instead of all of them. The result equals ``backward(); step()`` bit for bit.
    Keep calling ``step()`` after every backward pass: it ends the iteration (hooks, schedulers, closures), steps
    parameters that were added or thawed since, and is where a second, undeclared backward pass is told from a new
    iteration. Learning rates and options are read from the groups when a gradient arrives.

    What needs all gradients at once cannot work: ``clip_grad_norm_`` finds none and does nothing, a ``GradScaler``
    is refused (at its first ``step``, after one unusable iteration), and so are DDP and FSDP1, which reduce gradients
    later. An error inside a hook (a sparse gradient, say) leaves earlier parameters stepped.

    Args:
        optimizer: steps its own parameters from now on, until ``remove()``.

    Returns:
        The release: ``accumulate()`` for gradient accumulation, ``remove()`` to undo.

    Raises:
        TypeError: no AdamMini.
        RuntimeError: released already; more than one process with parameters that are no DTensors.
        ValueError: ``differentiable=True``.

    Example:
        >>> release = gradient_release(optimizer)
        >>> with release.accumulate():
        ...     loss(first).backward()
        >>> loss(second).backward()  # steps
        >>> optimizer.step()
    """
    return GradientRelease(optimizer)
