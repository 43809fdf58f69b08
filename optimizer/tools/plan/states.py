"""Optimizer state of one tensor: what each optimizer keeps, and what its step allocates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import torch

from ...state.specification import state_bytes
from ...step import moments
from ...step.dtypes import moment_format
from .holdings import Piece, Tensor
from .sharding import DTYPES, Setup

FP32 = 4
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TORCHAO_BLOCK = 256
_TORCHAO_SMALLEST = 4096  # torchao (and bitsandbytes) leave smaller tensors in the parameter's dtype
_TORCHAO_TABLE = 256 * FP32  # torchao keeps the fp32 values of its 256 codes with every quantised state
_SMALLEST, _LARGEST, _SHARE = 1 << 13, 1 << 16, 8  # as in optimizer.step.update: elements of a temporary
_PIECE = 1 << 15  # as in optimizer.step.moments: elements quantised at once
_PER_ELEMENT = 9 * FP32  # bytes allocated for each of them: measured


@dataclass(frozen=True)
class State:
    """Optimizer state of one rank, in bytes, by kind; and the largest temporary of a step.

    Attributes:
        exp_avg: first moment (codes, where it is quantised).
        exp_avg_sq: second moment (codes, where it is quantised).
        scales: quantisation scales and code tables.
        step: step counters, fp32, one per tensor.
        temporary: the most a step allocates beyond the above at any one time.
    """

    exp_avg: int = 0
    exp_avg_sq: int = 0
    scales: int = 0
    step: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        """Bytes that stay between steps."""
        return self.exp_avg + self.exp_avg_sq + self.scales + self.step

    def plus(self, other: State, times: int = 1) -> State:
        """Sums of the state; the temporaries of different tensors do not live together, so their maximum."""
        return State(
            self.exp_avg + times * other.exp_avg,
            self.exp_avg_sq + times * other.exp_avg_sq,
            self.scales + times * other.scales,
            self.step + times * other.step,
            max(self.temporary, other.temporary),
        )


Cost = Callable[[Tensor], State]


def torchao_moment(numel: int, itemsize: int, *, flat: bool) -> tuple[int, int]:
    """(bytes of codes, bytes of scales and table) of one of AdamW's moments in 8 bits, as torchao stores it.

    Tensors under 4,096 elements, or not a multiple of 256, stay in ``itemsize`` bytes; flat buffers are padded.
    """
    if not flat and (numel < _TORCHAO_SMALLEST or numel % _TORCHAO_BLOCK):
        return itemsize * numel, 0
    return numel, ceil(numel / _TORCHAO_BLOCK) * FP32 + _TORCHAO_TABLE


def adamw(itemsize: int) -> Cost:
    """torch.optim.AdamW with states of ``itemsize`` bytes; the temporary of one tensor is its root of exp_avg_sq."""

    def cost(tensor: Tensor) -> State:
        size = prod(tensor.shape) * itemsize
        return State(exp_avg=size, exp_avg_sq=size, step=FP32, temporary=size)

    return cost


def adamw_8bit(itemsize: int, *, flat: bool) -> Cost:
    """AdamW with both moments in 8 bits; the step compiled, without temporaries (to its favour)."""

    def cost(tensor: Tensor) -> State:
        codes, scales = torchao_moment(prod(tensor.shape), itemsize, flat=flat)
        return State(exp_avg=codes, exp_avg_sq=codes, scales=2 * scales, step=FP32)

    return cost


def adam_mini(setup: Setup) -> Cost:
    """Adam-mini: the bytes that ``optimizer.state`` keeps of a tensor, and the temporaries of ``optimizer.step``."""
    word, itemsize = setup.exp_avg_dtype, DTYPES[setup.stepped_dtype]
    group = {"exp_avg_dtype": word if word is None or word in moments.FORMATS else _TORCH[word], "bf16_rounding": None}

    def cost(tensor: Tensor) -> State:
        parameter = torch.empty(tensor.whole, dtype=_TORCH[setup.stepped_dtype], device="meta")
        kept = moment_format(parameter, group)
        scales = 0 if kept is None else kept.scale_dtype.itemsize * prod(moments.state_shapes(tensor.shape, kept)[1])
        size = state_bytes(parameter, tensor.shape, tensor.second, group)
        bound = partial(_temporary, itemsize=itemsize) if kept is None else partial(_quantising, itemsize=itemsize)
        temporary = max((bound(piece) for piece in tensor.pieces()), default=0)
        return State(size["exp_avg"] - scales, size["exp_avg_sq"], scales, size["step"], temporary)

    return cost


def _temporary(piece: Piece, itemsize: int) -> int:
    """Upper bound of what ``adam_mini_update`` allocates for elements of one tensor, in bytes."""
    numel, mixed = piece.numel, itemsize != FP32
    row = max(1, numel // max(1, piece.rows))
    window, second = _window(piece, row)
    copies = FP32 * window if mixed else 0  # a slice of the gradient in fp32
    squares = 2 * FP32 * second  # the mean squares, and at most as much again while runs are averaged
    return max(copies + squares, FP32 * second + 2 * copies)  # then of the parameter and of the first moment


def _quantising(piece: Piece, itemsize: int) -> int:
    """Upper bound of what a step with a quantised first moment allocates for one tensor, in bytes."""
    _, second = _window(piece, 1)
    copies = FP32 if itemsize != FP32 else 0
    return min(piece.numel, max(_PIECE, piece.quantised)) * (_PER_ELEMENT + copies) + 2 * FP32 * second


def _window(piece: Piece, row: int) -> tuple[int, int]:
    """(elements of a slice, second moments worked on at once)."""
    window = min(piece.numel, max(min(max(piece.numel >> _SHARE, _SMALLEST), _LARGEST), row))
    # A scalar per element: worked through in slices where there is more than one row.
    return window, window if piece.second == piece.numel else piece.second
