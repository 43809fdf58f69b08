"""Tensors in, one call for all of them out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ...partition.layout import Layout
from ...partition.roles import viewed
from .library import library

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_PAIRS = {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3)}
"""(parameter and gradient, first moment) the loop is compiled for."""
_PLAIN = (Tensor, torch.nn.Parameter)


def describe(layout: Layout, shape: Sequence[int]) -> Tensor:
    """A layout as the loop reads it: outer, between, axis, inner, repeat, segments, then (length, count) pairs."""
    view = viewed(tuple(shape), layout.fold) or (1,)
    lead, axis = len(layout.leading), layout.axis
    numbers = [prod(view[:lead]), prod(view[lead:axis]), view[axis], prod(view[axis + 1 :]), layout.runs.repeat,
               len(layout.runs.segments)]  # fmt: skip
    return torch.tensor(numbers + [n for pair in layout.runs.segments for n in pair], dtype=torch.int64)


def accepts(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[int, int] | None:
    """The (parameter, moment) types to call the loop with, or None where it cannot take these tensors."""
    if type(param) not in _PLAIN or type(grad) is not Tensor or grad.dtype is not param.dtype:
        return None
    code, moment = _CODES.get(param.dtype), _CODES.get(exp_avg.dtype)
    if code is None or moment is None or (code, moment) not in _PAIRS or param.device.type != "cpu":
        return None
    if exp_avg_sq.dtype is not (torch.float64 if code == 0 else torch.float32):
        return None
    if not (param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        return None
    return code, moment


class Ready:
    """A tensor the loop can take, with everything that stays from step to step looked up once.

    Pointers are only believed while the parameter and its state are the same objects at the same place.
    """

    __slots__ = ("_first", "_second", "_taken", "at", "dtype", "held", "kinds", "layout", "numel")

    def __init__(self, kinds: tuple[int, int], parameter: Tensor, state: Mapping[str, Tensor], layout: Tensor) -> None:
        self.kinds, self.layout = kinds, layout
        self.at, self.numel, self.dtype = parameter.data_ptr(), parameter.numel(), parameter.dtype
        self._first, self._second, self._taken = state["exp_avg"], state["exp_avg_sq"], state["step"]
        self.held = tuple(t.data_ptr() for t in (self._first, self._second, self._taken, layout))

    def takes(self, parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> bool:
        """Whether nothing has changed that the loop relies on."""
        return (
            parameter.data_ptr() == self.at
            and parameter.numel() == self.numel
            and grad.dtype is self.dtype
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and type(grad) is Tensor
            and state.get("exp_avg") is self._first
            and state.get("exp_avg_sq") is self._second
            and state.get("step") is self._taken
        )


def prepare(parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor], layout: Layout) -> Ready | None:
    """A ``Ready`` for the tensor, or None where the loop cannot take it."""
    kinds = accepts(parameter, grad, state["exp_avg"], state["exp_avg_sq"])
    if kinds is None or state["step"].dtype is not torch.float32 or state["step"].device.type != "cpu":
        return None
    return Ready(kinds, parameter, state, describe(layout, parameter.shape))


class Batches:
    """Tensors of one group, sorted by the types the loop is called with."""

    def __init__(self) -> None:
        self._pointers: dict[tuple[int, int], array[int]] = {}
        self._changed: list[Tensor] = []

    def __len__(self) -> int:
        return sum(len(pointers) // 6 for pointers in self._pointers.values())

    def add(self, ready: Ready, parameter: Tensor, grad: Tensor) -> None:
        """One more tensor; it and its gradient must stay alive until ``step``."""
        self._changed.append(parameter)
        pointers = self._pointers.get(ready.kinds)
        if pointers is None:
            pointers = self._pointers[ready.kinds] = array("q")
        pointers.extend((ready.at, grad.data_ptr(), *ready.held))

    def step(
        self, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool,
        grad_scale: float = 1.0,
    ) -> None:  # fmt: skip
        """One Adam-mini step of every tensor, its counter included; numbers as in ``adam_mini_update``."""
        loaded = library()
        assert loaded is not None
        for kinds, pointers in self._pointers.items():
            loaded.adam_mini_step(
                len(pointers) // 6, pointers.buffer_info()[0], *kinds, lr, beta1, beta2, eps, weight_decay,
                -1.0 if maximize else 1.0, grad_scale, torch.get_num_threads(),
            )  # fmt: skip
        # The loop writes behind autograd's back: a graph that still needs the old values must notice.
        torch.autograd.graph.increment_version(self._changed)
