"""Tensors in, one call for all of them out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ....partition.layout import Layout
from ...dtypes import second_moment_dtype
from ...moments import FORMATS, format_of, stored_shapes
from .layouts import encoded, overlaps
from .library import library

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LOW_BIT = {kept.dtype: kept.bits for kept in FORMATS.values()}
_PAIRS = {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3),
          *((p, bits) for p in range(4) for bits in _LOW_BIT.values())}  # fmt: skip
"""(parameter and gradient, first moment) the loop is compiled for."""
_ROUNDINGS = {None: 0, "stochastic": 1, "kahan": 2}
_PLAIN = (Tensor, torch.nn.Parameter)
_STATE = ("exp_avg", "exp_avg_sq", "step", "exp_avg_scale", "compensation")
_DTYPE = attrgetter("dtype")


def obstacle(
    parameter: Tensor, grad: Tensor, state: Mapping[str, Any], *, rounding: str | None = None, low_bit: bool = False
) -> str | None:
    """Why the loop cannot take these tensors, in words, or None where it can.

    Args:
        parameter: the parameter.
        grad: its gradient.
        state: its state, or an empty one where there is none yet.
        rounding: of bf16 parameters: None (to nearest), "stochastic", "kahan".
        low_bit: whether the state to come, where there is none yet, holds a quantised first moment.
    """
    if type(parameter) not in _PLAIN or type(grad) is not Tensor:
        return f"they are {type(parameter).__name__} and {type(grad).__name__}, not plain tensors"
    if parameter.device.type != "cpu" or grad.device.type != "cpu":
        return f"they are on {parameter.device} and {grad.device}"
    if parameter.layout is not torch.strided or grad.layout is not torch.strided:
        return f"their layouts are {parameter.layout} and {grad.layout}"
    if grad.dtype is not parameter.dtype or parameter.dtype not in _CODES:
        return f"their dtypes are {parameter.dtype} and {grad.dtype}"
    if grad.shape != parameter.shape or grad.is_neg():
        return f"the gradient has shape {tuple(grad.shape)} or a negative view; the parameter {tuple(parameter.shape)}"
    if rounding is not None and (parameter.dtype is not torch.bfloat16 or rounding not in _ROUNDINGS):
        return f"bf16_rounding={rounding!r} is none of {list(_ROUNDINGS)}, or the parameter is not bfloat16"
    if parameter.numel() and overlaps(parameter):
        return f"elements of the parameter share memory (strides {parameter.stride()})"
    if low_bit or "exp_avg_scale" in state:
        for name, tensor in (("parameter", parameter), ("gradient", grad)):
            if not tensor.is_contiguous():
                return f"the first moment is quantised and the {name} has strides {tensor.stride()}"
    return _state_obstacle(parameter, state, rounding) if state else None


def _state_obstacle(parameter: Tensor, state: Mapping[str, Any], rounding: str | None) -> str | None:
    """Why the loop cannot take the state of a parameter that it takes."""
    wanted = ["exp_avg", "exp_avg_sq", "step", *(["compensation"] if rounding == "kahan" else [])]
    for name in (*wanted, *(["exp_avg_scale"] if "exp_avg_scale" in state else [])):
        tensor = state.get(name)
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return f"their state's {name} is not a plain tensor on the CPU"
    first, second, taken = (state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
    if second.dtype is not second_moment_dtype(parameter):
        return f"their exp_avg_sq is {second.dtype}"
    if not second.is_contiguous() or taken.dtype is not torch.float32 or taken.numel() != 1:
        return "their exp_avg_sq is not contiguous, or their step not one float32"
    scale = state.get("exp_avg_scale")
    code = (_CODES if scale is None else _LOW_BIT).get(first.dtype)
    if code is None or (_CODES[parameter.dtype], code) not in _PAIRS:
        return f"their exp_avg is {first.dtype} beside a parameter of {parameter.dtype}"
    if scale is not None:
        return _scale_obstacle(parameter, first, scale)
    compensation = [state["compensation"]] if rounding == "kahan" else []
    if any(t.shape != parameter.shape or overlaps(t) for t in (first, *compensation)):
        return "their exp_avg or compensation has another shape or elements that share memory"
    if compensation and compensation[0].dtype is not torch.bfloat16:
        return f"their compensation is {compensation[0].dtype}"
    return None


def _scale_obstacle(parameter: Tensor, codes: Tensor, scale: Tensor) -> str | None:
    """Likewise, of a quantised first moment."""
    kept, lead = format_of(codes), scale.dim() - 1
    stored, wanted = stored_shapes(tuple(parameter.shape[:lead]), parameter.shape[lead:], kept)
    if tuple(codes.shape) != stored or tuple(scale.shape) != wanted or scale.dtype is not kept.scale_dtype:
        return f"their quantised exp_avg and its scale have shapes {tuple(codes.shape)} and {tuple(scale.shape)}"
    return None if codes.is_contiguous() and scale.is_contiguous() else "their quantised exp_avg is not contiguous"


def _row(parameter: Tensor, scale: Tensor) -> int:
    """Elements of a row of the quantised first moment: the scale has its last axis in their place."""
    return prod(parameter.shape[scale.dim() - 1 :])


class Ready:
    """A tensor the loop can take, with everything that stays from step to step looked up once.

    Addresses are only believed while the parameter and its state are the same objects at the same place.
    """

    __slots__ = ("_layout", "careful", "dtype", "given", "places", "record", "shape", "state", "strides", "values")

    def __init__(
        self, parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor], layout: Tensor, seed: int, rounding: int
    ) -> None:
        self.shape, self.dtype = parameter.shape, grad.dtype
        self.strides, self.given = parameter.stride(), grad.stride()
        # A negative view has every other sign, and only where memory has gaps or is one element can autograd make one.
        self.careful = not grad.is_contiguous() or grad.numel() == 1
        self.state = tuple(state.get(name) for name in _STATE)
        self.values = tuple(state.values())
        self.places = tuple(t.data_ptr() for t in self.values if isinstance(t, Tensor))
        self._layout = layout
        first, second, taken, scale, compensation = (0 if t is None else t.data_ptr() for t in self.state)
        low_bit = self.state[3] is not None
        self.record = (
            parameter.data_ptr(), first, second, taken, layout.data_ptr(), scale, compensation, seed,
            _CODES[parameter.dtype], (_LOW_BIT if low_bit else _CODES)[state["exp_avg"].dtype], rounding,
        )  # fmt: skip

    def takes(self, parameter: Tensor, grad: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether nothing has changed that the loop relies on."""
        if not all(state.get(name) is held for name, held in zip(_STATE, self.state, strict=True)):
            return False
        one = Batches(1)
        one.add(self, parameter, grad)
        return one.takes([parameter], [grad], {parameter: state})


def prepare(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    seed: int = 0,
    rounding: str | None = None,
) -> Ready | None:
    """A ``Ready`` for the tensor, or None where the loop cannot take it.

    Args:
        parameter: the parameter.
        grad: its gradient, any strides.
        state: exp_avg, exp_avg_sq, step; exp_avg_scale where exp_avg is quantised; compensation for "kahan".
        layout: the parameter's blocks.
        seed: uint32, for "stochastic".
        rounding: of bf16 parameters: None (to nearest), "stochastic", "kahan".
    """
    if not state or obstacle(parameter, grad, state, rounding=rounding) is not None:
        return None
    scale = state.get("exp_avg_scale")
    moment = state["exp_avg"] if scale is None else parameter
    in_numbers = encoded(
        layout,
        0 if scale is None else _row(parameter, scale),
        rounding is not None,
        (parameter, grad, moment, state["compensation"] if rounding == "kahan" else parameter),
    )
    return Ready(parameter, grad, state, in_numbers, seed & 0xFFFFFFFF, _ROUNDINGS[rounding])


class Batches:
    """The tensors of one group that the loop takes; kept from step to step, with only gradients looked up anew.

    What is asked of every tensor at every step is asked in passes over lists, which cost a fraction of a loop's body.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._positions: list[int] = []
        self._ready: list[Ready] = []
        self._tensors: list[Tensor] = []
        self._records, self._gradients = array("q"), array("q")
        self._known: _Known | None = None

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def others(self) -> list[int]:
        """Positions in the group of what it does not hold."""
        if len(self._positions) == self._size:
            return []
        return sorted(set(range(self._size)).difference(self._positions))

    def add(self, ready: Ready, parameter: Tensor, grad: Tensor, position: int = 0) -> None:
        """One more tensor, at ``position`` of its group; it and its gradient must stay alive until ``step``."""
        self._known = None
        self._positions.append(position)
        self._ready.append(ready)
        self._tensors.append(parameter)
        self._records.extend(ready.record)
        self._gradients.append(grad.data_ptr())

    def takes(
        self, parameters: Sequence[Tensor], grads: Sequence[Tensor | None], states: Mapping[Tensor, Mapping[str, Any]]
    ) -> bool:
        """Whether everything it holds can be taken again, with these gradients; if not, nothing of it can be used.

        Args:
            parameters: of the whole group.
            grads: theirs, or None.
            states: theirs.
        """
        if len(parameters) != self._size or not self._positions:
            return False
        if len(self._positions) != self._size:
            parameters = [parameters[i] for i in self._positions]
            grads = [grads[i] for i in self._positions]
        if self._known is None:
            self._known = _Known(self._ready)
        try:
            if not all(map(is_, parameters, self._tensors)) or not self._known.same(parameters, states):
                return False
            addresses = self._known.gradients(grads)
        except (KeyError, TypeError, RuntimeError):  # no state, no gradient, none with an address
            return False
        if addresses is None:
            return False
        self._gradients = array("q", addresses)
        return True

    def step(
        self,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        grad_scale: float = 1.0,
    ) -> None:
        """One Adam-mini step of every tensor, its counter included.

        Args:
            lr: as in ``adam_mini_update``; likewise those up to ``maximize``.
            beta1: see there.
            beta2: see there.
            eps: see there.
            weight_decay: see there.
            maximize: see there.
            grad_scale: what gradients were multiplied by; they are read divided by it and not changed.
        """
        if not self._positions:
            return
        loaded = library()
        assert loaded is not None
        loaded.adam_mini_step(
            len(self._positions), self._records.buffer_info()[0], self._gradients.buffer_info()[0], lr, beta1, beta2,
            eps, weight_decay, (-1.0 if maximize else 1.0) / grad_scale, torch.get_num_threads(),
        )  # fmt: skip
        # The loop writes behind autograd's back: a graph that still needs the old values must notice.
        torch.autograd.graph.increment_version(self._tensors)


class _Known:
    """What must not have changed, as lists to compare with."""

    def __init__(self, ready: Sequence[Ready]) -> None:
        self._at = [r.record[0] for r in ready]
        self._sizes = [r.shape for r in ready]
        self._strides = [r.strides for r in ready]
        self._values = list(chain.from_iterable(r.values for r in ready))
        self._places = list(chain.from_iterable(r.places for r in ready))
        self._dtypes = [r.dtype for r in ready]
        self._given = [r.given for r in ready]
        self._careful = [i for i, r in enumerate(ready) if r.careful]

    def same(self, parameters: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the parameters and all their state lie where they lay."""
        of_each: Any = map(states.__getitem__, parameters)
        values: list[Tensor] = list(chain.from_iterable(map(dict.values, of_each)))
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and list(map(Tensor.data_ptr, values)) == self._places
            and list(map(Tensor.data_ptr, parameters)) == self._at
            and list(map(Tensor.size, parameters)) == self._sizes
            and list(map(Tensor.stride, parameters)) == self._strides
        )

    def gradients(self, grads: Sequence[Tensor | None]) -> list[int] | None:
        """Addresses of the gradients, or None where one is not what the loop was prepared for."""
        if set(map(type, grads)) != {Tensor}:
            return None
        given: Any = grads
        if (
            list(map(_DTYPE, given)) != self._dtypes
            or list(map(Tensor.stride, given)) != self._given
            or list(map(Tensor.size, given)) != self._sizes
            or any(given[i].is_neg() for i in self._careful)
        ):
            return None
        return list(map(Tensor.data_ptr, given))
