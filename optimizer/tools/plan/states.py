"""The bytes of optimizer state of one tensor, and the bytes that a step allocates, for each optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch

from ...state.specification import state_bytes
from ...step import moments
from ...step.update import SLICE
from .holdings import Portion, Tensor
from .sharding import DTYPES, Setup

FP32 = 4
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TORCHAO_BLOCK = 256
_TORCHAO_SMALLEST = 4096  # Like bitsandbytes, torchao stores smaller tensors in the parameter's dtype.
_TORCHAO_TABLE = 256 * FP32  # Every quantised state stores the fp32 values of its 256 codes.
_CHUNK = 1 << 15  # as in optimizer.step.moments: elements quantised at once
_PER_ELEMENT = 9 * FP32  # bytes allocated for each of these elements: measured


@dataclass(frozen=True)
class State:
    """Bytes of optimizer state of one rank, and of the largest temporary allocation of a step.

    Attributes:
        exp_avg: first moment; its codes if it is quantised.
        exp_avg_sq: second moment; its codes if it is quantised.
        scales: quantisation scales and code tables.
        step: step counters, one fp32 number per tensor.
        temporary: the most memory that a step allocates at any one time in addition to the state.
    """

    exp_avg: int = 0
    exp_avg_sq: int = 0
    scales: int = 0
    step: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        """Bytes of state between steps."""
        return self.exp_avg + self.exp_avg_sq + self.scales + self.step

    def plus(self, other: State, times: int = 1) -> State:
        """Add ``times`` the other state. Temporaries of different tensors exist one at a time: the maximum counts."""
        return State(
            self.exp_avg + times * other.exp_avg,
            self.exp_avg_sq + times * other.exp_avg_sq,
            self.scales + times * other.scales,
            self.step + times * other.step,
            max(self.temporary, other.temporary),
        )


Cost = Callable[[Tensor], State]


def torchao_moment(numel: int, itemsize: int, *, flat: bool) -> tuple[int, int]:
    """Return (bytes of codes, bytes of scales and table) of one moment of AdamW in 8 bits, as torchao stores it.

    Args:
        numel: number of elements.
        itemsize: bytes of an unquantised element. Tensors of fewer than 4,096 elements, or whose number of elements is
            not a multiple of 256, are not quantised.
        flat: whether the tensor is a flat buffer, which is padded to a multiple of 256 and always quantised.
    """
    if not flat and (numel < _TORCHAO_SMALLEST or numel % _TORCHAO_BLOCK):
        return itemsize * numel, 0
    return numel, ceil(numel / _TORCHAO_BLOCK) * FP32 + _TORCHAO_TABLE


def adamw(itemsize: int) -> Cost:
    """Return the cost of torch.optim.AdamW with states of ``itemsize`` bytes; its temporary is sqrt(exp_avg_sq)."""

    def cost(tensor: Tensor) -> State:
        size = prod(tensor.shape) * itemsize
        return State(exp_avg=size, exp_avg_sq=size, step=FP32, temporary=size)

    return cost


def adamw_8bit(itemsize: int, *, flat: bool) -> Cost:
    """Return the cost of AdamW with both moments in 8 bits, assuming a compiled step without temporaries."""

    def cost(tensor: Tensor) -> State:
        codes, scales = torchao_moment(prod(tensor.shape), itemsize, flat=flat)
        return State(exp_avg=codes, exp_avg_sq=codes, scales=2 * scales, step=FP32)

    return cost


def adam_mini(setup: Setup) -> Cost:
    """Return the cost of Adam-mini: the state of ``optimizer.state`` and the temporaries of ``optimizer.step``."""
    name, itemsize = setup.exp_avg_dtype, DTYPES[setup.stepped_dtype]
    fmt = moments.FORMATS.get(name or "")
    group = {"exp_avg_dtype": name if name is None or name in moments.FORMATS else _TORCH[name], "bf16_rounding": None}

    def cost(tensor: Tensor) -> State:
        parameter = torch.empty(tensor.whole, dtype=_TORCH[setup.stepped_dtype], device="meta")
        size, scales = state_bytes(parameter, tensor.shape, tensor.second, group), 0
        quantised = None if fmt is None else tensor.quantised(fmt, FP32)
        if quantised is not None:
            size["exp_avg"], scales = quantised
        bound = partial(_temporary if quantised is None else _quantising, itemsize=itemsize)
        temporary = max((bound(portion) for portion in tensor.portions()), default=0)
        return State(size["exp_avg"], size["exp_avg_sq"], scales, size["step"], temporary)

    return cost


def _temporary(portion: Portion, itemsize: int) -> int:
    """Return an upper bound of the bytes that ``adam_mini_update`` allocates for elements of one tensor."""
    numel, mixed = portion.numel, itemsize != FP32
    row = max(1, numel // max(1, portion.rows))
    window, second = _window(portion, row)
    copies = FP32 * window if mixed else 0  # a slice of the gradient in fp32
    squared = FP32 * window if portion.apart else copies  # a slice of its squares
    squares = 2 * FP32 * second  # the mean squares, and at most one copy while runs are averaged
    return max(squared + squares, FP32 * second + 2 * copies)  # then slices of the parameter and first moment


def _quantising(portion: Portion, itemsize: int) -> int:
    """Return an upper bound of the bytes that a step with a quantised first moment allocates for one tensor."""
    _, second = _window(portion, 1)
    copies = FP32 if itemsize != FP32 else 0
    return min(portion.numel, max(_CHUNK, portion.quantised)) * (_PER_ELEMENT + copies) + 2 * FP32 * second


def _window(portion: Portion, row: int) -> tuple[int, int]:
    """Return (elements of a slice, second-moment values that are updated at once)."""
    window = min(portion.numel, max(SLICE, row))
    # With one scalar per element, the second moment is updated in the same slices.
    return window, window if portion.second == portion.numel else portion.second
