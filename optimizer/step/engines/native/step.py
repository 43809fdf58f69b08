"""The Python side of the native loop: which tensors it supports, and one call of it for all tensors of a group."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from operator import attrgetter, is_
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ....partition.factored import FactoredLayout, TensorLayout
from ...dtypes import second_moment_dtype
from ...moments import FORMATS, format_of, stored_shapes
from ...rounding import PARAMETER_STREAM
from .layouts import encoded, encoded_factored, overlaps
from .library import library
from .ways import DEFAULT, Chooser

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LOW_BIT = {format.dtype: format.bits for format in FORMATS.values()}
_UNQUANTISED_PAIRS = {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3)}
_PAIRS = _UNQUANTISED_PAIRS | {(p, bits) for p in range(4) for bits in _LOW_BIT.values()}
"""Pairs of codes (dtype of parameter and gradient, dtype or bits of first moment) that the loop is compiled for."""
_ROUNDINGS = {None: 0, "stochastic": 1, "kahan": 2}
_PLAIN = (Tensor, torch.nn.Parameter)
_STATE = ("exp_avg", "exp_avg_sq", "step", "exp_avg_scale", "compensation", "exp_avg_sq_col")
_DTYPE = attrgetter("dtype")


def obstacle(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    *,
    layout: TensorLayout | None = None,
    rounding: str | None = None,
    low_bit: bool = False,
) -> str | None:
    """Return why the native loop does not support these tensors, in words, or None if it does.

    Args:
        parameter: the parameter.
        grad: its gradient.
        state: its state; empty before the first step.
        layout: the layout of the parameter; needed if its second moment is factored.
        rounding: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
        low_bit: whether the state will contain a quantised first moment; needed if ``state`` is empty.
    """
    if type(parameter) not in _PLAIN or type(grad) is not Tensor:
        return f"they are {type(parameter).__name__} and {type(grad).__name__}, not plain tensors"
    if parameter.device.type != "cpu" or grad.device.type != "cpu":
        return f"they are on {parameter.device} and {grad.device}, not on the CPU"
    if parameter.layout is not torch.strided or grad.layout is not torch.strided:
        return f"their layouts are {parameter.layout} and {grad.layout}"
    if grad.dtype is not parameter.dtype or parameter.dtype not in _CODES:
        return f"their dtypes are {parameter.dtype} and {grad.dtype}"
    if grad.shape != parameter.shape or grad.is_neg():
        return f"the gradient has shape {tuple(grad.shape)} or a negative view; the parameter {tuple(parameter.shape)}"
    if rounding is not None and (parameter.dtype is not torch.bfloat16 or rounding not in _ROUNDINGS):
        return f"bf16_rounding={rounding!r} is not one of {list(_ROUNDINGS)}, or the parameter is not bfloat16"
    if parameter.numel() and overlaps(parameter):
        return f"elements of the parameter share memory (strides {parameter.stride()})"
    if low_bit or "exp_avg_scale" in state:
        for name, tensor in (("parameter", parameter), ("gradient", grad)):
            if not tensor.is_contiguous():
                return f"the first moment is quantised and the {name} has strides {tensor.stride()}"
    reason = _state_obstacle(parameter, state, rounding) if state else None
    if reason is None and isinstance(layout, FactoredLayout):
        return _factored_obstacle(parameter, state, layout, rounding)
    return reason


def _state_obstacle(parameter: Tensor, state: Mapping[str, Any], rounding: str | None) -> str | None:
    """Return why the loop does not support the state of a parameter that it supports, or None if it does."""
    required = ["exp_avg", "exp_avg_sq", "step", *(["compensation"] if rounding == "kahan" else [])]
    for name in (*required, *(["exp_avg_scale"] if "exp_avg_scale" in state else [])):
        tensor = state.get(name)
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return f"their state's {name} is not a plain tensor on the CPU"
    first, second, step = (state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
    if second.dtype is not second_moment_dtype(parameter):
        return f"their exp_avg_sq is {second.dtype}"
    if not second.is_contiguous() or step.dtype is not torch.float32 or step.numel() != 1:
        return "their exp_avg_sq is not contiguous, or their step is not one float32"
    scale = state.get("exp_avg_scale")
    code = (_CODES if scale is None else _LOW_BIT).get(first.dtype)
    if code is None or (_CODES[parameter.dtype], code) not in _PAIRS:
        return f"their exp_avg is {first.dtype} and the parameter is {parameter.dtype}"
    if scale is not None:
        return _scale_obstacle(parameter, first, scale)
    compensation = [state["compensation"]] if rounding == "kahan" else []
    if any(t.shape != parameter.shape or overlaps(t) for t in (first, *compensation)):
        return "their exp_avg or compensation has another shape or elements that share memory"
    if compensation and compensation[0].dtype is not torch.bfloat16:
        return f"their compensation is {compensation[0].dtype}"
    return None


def _scale_obstacle(parameter: Tensor, codes: Tensor, scale: Tensor) -> str | None:
    """Return why the loop does not support a quantised first moment, or None if it does."""
    format, lead = format_of(codes), scale.dim() - 1
    codes_shape, scale_shape = stored_shapes(tuple(parameter.shape[:lead]), parameter.shape[lead:], format)
    if tuple(codes.shape) != codes_shape or tuple(scale.shape) != scale_shape or scale.dtype is not format.scale_dtype:
        return f"their quantised exp_avg and its scale have shapes {tuple(codes.shape)} and {tuple(scale.shape)}"
    return None if codes.is_contiguous() and scale.is_contiguous() else "their quantised exp_avg is not contiguous"


def _factored_obstacle(
    parameter: Tensor, state: Mapping[str, Any], layout: FactoredLayout, rounding: str | None
) -> str | None:
    """Return why the loop does not support a factored second moment of tensors that it supports, or None if it does.

    A gradient that is not dense in the parameter's order is copied first (``dense_gradient``), so it is no obstacle.
    """
    shapes = {
        "exp_avg_sq": layout.aligned_shape(parameter.shape),
        "exp_avg_sq_col": layout.columns_shape(parameter.shape),
    }
    for name, shape in shapes.items() if state else ():
        tensor = state.get(name)
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return f"their state's {name} is not a plain tensor on the CPU"
        if tensor.dtype is not second_moment_dtype(parameter) or tuple(tensor.shape) != shape:
            return f"their {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not of shape {shape}"
        if not tensor.is_contiguous():
            return f"their {name} is not contiguous"
    if _encoded(parameter, parameter, state, layout, rounding) is None:
        moment = state.get("exp_avg", parameter)
        return (
            "their second moment is factored, and the parameter and exp_avg are not dense in one order of axes "
            f"(strides {parameter.stride()}, {moment.stride()})"
        )
    return None


def dense_gradient(parameter: Tensor, grad: Tensor) -> Tensor:
    """Return a copy of the gradient in the parameter's memory order, if that is dense."""
    return torch.empty_like(parameter, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)


def _encoded(
    parameter: Tensor, grad: Tensor, state: Mapping[str, Any], layout: TensorLayout, rounding: str | None
) -> Tensor | None:
    """Return the encoded layout of a parameter; None if it is factored and its strides are not supported."""
    scale = state.get("exp_avg_scale")
    moment = parameter if scale is not None else state.get("exp_avg", parameter)
    row = 0 if scale is None else _row(parameter, scale)
    compensation = state.get("compensation", parameter) if rounding == "kahan" else parameter
    tensors = (parameter, grad, moment, compensation)
    if isinstance(layout, FactoredLayout):
        return encoded_factored(layout, row, rounding == "stochastic", tensors)
    return encoded(layout, row, rounding is not None, tensors)


def _row(parameter: Tensor, scale: Tensor) -> int:
    """Return the elements of a row of a quantised first moment; the scale's last axis replaces the row's axes."""
    return prod(parameter.shape[scale.dim() - 1 :])


class Ready:
    """A parameter that the native loop supports, with the data for its call, which stay the same from step to step.

    The addresses in the record are valid while the parameter and its state are the same objects with the same storage.

    Attributes:
        shape: shape of the parameter and of its gradient.
        dtype: dtype of the gradient.
        strides: strides of the parameter.
        grad_strides: strides of the gradient.
        may_be_negative: whether a gradient of these strides can be a negative view.
        state: the state tensors in the order of ``_STATE``, None for a missing one.
        state_values: all values of the state in the order of its dict.
        state_addresses: addresses of the tensors among ``state_values``.
        record: the numbers of ``Record`` in tensors.h.
    """

    __slots__ = (
        "_layout",
        "dtype",
        "grad_strides",
        "may_be_negative",
        "record",
        "shape",
        "state",
        "state_addresses",
        "state_values",
        "strides",
    )

    def __init__(
        self, parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor], layout: Tensor, seed: int, rounding: int
    ) -> None:
        self.shape, self.dtype = parameter.shape, grad.dtype
        self.strides, self.grad_strides = parameter.stride(), grad.stride()
        # The memory of a negative view has the opposite sign. Autograd only creates such views with gaps in memory or
        # with a single element.
        self.may_be_negative = not grad.is_contiguous() or grad.numel() == 1
        self.state = tuple(state.get(name) for name in _STATE)
        self.state_values = tuple(state.values())
        self.state_addresses = tuple(t.data_ptr() for t in self.state_values if isinstance(t, Tensor))
        self._layout = layout
        first, second, step, scale, compensation, columns = (0 if t is None else t.data_ptr() for t in self.state)
        low_bit = self.state[3] is not None
        self.record = (
            parameter.data_ptr(),
            first,
            second,
            step,
            layout.data_ptr(),
            scale,
            compensation,
            columns,
            seed,
            _CODES[parameter.dtype],
            (_LOW_BIT if low_bit else _CODES)[state["exp_avg"].dtype],
            rounding,
        )

    def matches(self, parameter: Tensor, grad: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether the record is still valid for these tensors."""
        if not all(state.get(name) is tensor for name, tensor in zip(_STATE, self.state, strict=True)):
            return False
        single = Batches(1)
        single.add(self, parameter, grad)
        return single.matches([parameter], [grad], {parameter: state})


def prepare(
    parameter: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    layout: TensorLayout,
    *,
    seed: int = 0,
    streams: tuple[int, int] | None = None,
    rounding: str | None = None,
) -> Ready | None:
    """Return a ``Ready`` for the parameter, or None if the native loop does not support it.

    Args:
        parameter: the parameter.
        grad: its gradient, any strides.
        state: exp_avg, exp_avg_sq, step; exp_avg_sq_col if the second moment is factored; exp_avg_scale if exp_avg is
            quantised; compensation for "kahan".
        layout: the layout of the parameter.
        seed: the tensor's seed, uint32, for random rounding.
        streams: for a shard, the result of ``Place.streams`` instead of the seed.
        rounding: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
    """
    if not state or obstacle(parameter, grad, state, layout=layout, rounding=rounding) is not None:
        return None
    encoded_layout = _encoded(parameter, grad, state, layout, rounding)
    if encoded_layout is None:
        return None
    blocks, elements = (seed & 0xFFFFFFFF, (seed & 0xFFFFFFFF) ^ PARAMETER_STREAM) if streams is None else streams
    return Ready(parameter, grad, state, encoded_layout, _int64(blocks | elements << 32), _ROUNDINGS[rounding])


def _int64(value: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return value - (1 << 64) if value >> 63 else value


class Batches:
    """The tensors of one group in one call of the native loop, kept from step to step.

    At every step only the addresses of the gradients are read again, and all else is checked for changes. The checks
    are passes over whole lists, because a Python loop over the tensors would cost several times more.

    Args:
        size: number of parameters of the group.
        chooser: finds the fastest way through memory; None for the default way.
    """

    def __init__(self, size: int, chooser: Chooser | None = None) -> None:
        self._size, self._chooser = size, chooser
        self._elements = 0
        self._positions: list[int] = []
        self._ready: list[Ready] = []
        self._tensors: list[Tensor] = []
        self._records, self._gradients = array("q"), array("q")
        self._snapshot: _Snapshot | None = None

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def others(self) -> list[int]:
        """Positions in the group of the parameters that are not part of the call."""
        if len(self._positions) == self._size:
            return []
        return sorted(set(range(self._size)).difference(self._positions))

    def add(self, ready: Ready, parameter: Tensor, grad: Tensor, position: int = 0) -> None:
        """Add the parameter at ``position`` of its group; it and its gradient must exist until ``step`` is called."""
        self._snapshot = None
        self._positions.append(position)
        self._ready.append(ready)
        self._tensors.append(parameter)
        self._records.extend(ready.record)
        self._gradients.append(grad.data_ptr())
        self._elements += parameter.numel()

    def matches(
        self, parameters: Sequence[Tensor], grads: Sequence[Tensor | None], states: Mapping[Tensor, Mapping[str, Any]]
    ) -> bool:
        """Whether the call can be repeated with these gradients, whose addresses are then stored.

        If not, these batches must not be used again.

        Args:
            parameters: all parameters of the group.
            grads: their gradients; None for a parameter without one.
            states: the state of each parameter.
        """
        if len(parameters) != self._size or not self._positions:
            return False
        if len(self._positions) != self._size:
            parameters = [parameters[i] for i in self._positions]
            grads = [grads[i] for i in self._positions]
        if self._snapshot is None:
            self._snapshot = _Snapshot(self._ready)
        try:
            if not all(map(is_, parameters, self._tensors)) or not self._snapshot.matches(parameters, states):
                return False
            addresses = self._snapshot.addresses_of(grads)
        except (KeyError, TypeError, RuntimeError):  # a state or gradient is missing, or a tensor has no address
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
        """Take one Adam-mini step of every tensor, in place, and increment the step counters.

        Args:
            lr: learning rate.
            beta1: decay rate of the first moment, in [0, 1).
            beta2: decay rate of the second moment, in [0, 1).
            eps: added to the square root of the bias-corrected second moment.
            weight_decay: coefficient of the decoupled weight decay.
            maximize: whether to ascend the gradient instead of descending it.
            grad_scale: the factor by which the gradients were multiplied. The step divides by it and does not change
                the gradients.
        """
        if not self._positions:
            return
        loaded = library()
        assert loaded is not None
        way = array("q", DEFAULT if self._chooser is None else self._chooser.way)
        started = perf_counter()
        loaded.adam_mini_step(
            len(self._positions),
            self._records.buffer_info()[0],
            self._gradients.buffer_info()[0],
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            (-1.0 if maximize else 1.0) / grad_scale,
            torch.get_num_threads(),
            way.buffer_info()[0],
        )
        if self._chooser is not None:
            self._chooser.took(perf_counter() - started, self._elements)
        # Autograd does not see what the loop writes. With new versions, a backward pass that needs the old values fails
        # instead of using the new ones.
        torch.autograd.graph.increment_version(self._tensors)


class _Snapshot:
    """The properties of all tensors on which the records rely, as lists to compare with at every step."""

    def __init__(self, ready: Sequence[Ready]) -> None:
        self._addresses = [r.record[0] for r in ready]
        self._sizes = [r.shape for r in ready]
        self._strides = [r.strides for r in ready]
        self._state_values = list(chain.from_iterable(r.state_values for r in ready))
        self._state_addresses = list(chain.from_iterable(r.state_addresses for r in ready))
        self._dtypes = [r.dtype for r in ready]
        self._grad_strides = [r.grad_strides for r in ready]
        self._may_be_negative = [i for i, r in enumerate(ready) if r.may_be_negative]

    def matches(self, parameters: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the parameters and all state tensors have the same addresses, shapes and strides as before."""
        parameter_states: Any = map(states.__getitem__, parameters)
        values: list[Tensor] = list(chain.from_iterable(map(dict.values, parameter_states)))
        return (
            len(values) == len(self._state_values)
            and all(map(is_, values, self._state_values))
            and list(map(Tensor.data_ptr, values)) == self._state_addresses
            and list(map(Tensor.data_ptr, parameters)) == self._addresses
            and list(map(Tensor.size, parameters)) == self._sizes
            and list(map(Tensor.stride, parameters)) == self._strides
        )

    def addresses_of(self, grads: Sequence[Tensor | None]) -> list[int] | None:
        """Return the addresses of the gradients, or None if one of them differs from what the record describes."""
        if set(map(type, grads)) != {Tensor}:
            return None
        tensors: Any = grads
        if (
            list(map(_DTYPE, tensors)) != self._dtypes
            or list(map(Tensor.stride, tensors)) != self._grad_strides
            or list(map(Tensor.size, tensors)) != self._sizes
            or any(tensors[i].is_neg() for i in self._may_be_negative)
        ):
            return None
        return list(map(Tensor.data_ptr, tensors))
