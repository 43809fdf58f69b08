"""Optimizer state of one piece of one parameter: what each optimizer keeps, and what its step allocates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from optimizer.partition import Anatomy, Layout

from .sharding import DTYPES, Piece, Setup

FP32 = 4
QUANTISATION_BLOCK = 256
_SMALLEST_QUANTISED = 4096  # torchao (and bitsandbytes) leave smaller tensors in the parameter's dtype
_TABLE = 256 * FP32  # torchao keeps the fp32 values of its 256 codes with every quantised state
_SMALLEST, _LARGEST, _SHARE = 1 << 13, 1 << 16, 8  # as in optimizer.step.update: elements of a temporary


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


Cost = Callable[[Piece], State]


def quantised(numel: int, itemsize: int, *, flat: bool) -> tuple[int, int]:
    """(bytes of codes, bytes of scales and table) of one moment in 8 bits, blockwise, as torchao stores it.

    Tensors under 4,096 elements, or not a multiple of 256, stay in ``itemsize`` bytes; flat buffers are padded.
    """
    if not flat and (numel < _SMALLEST_QUANTISED or numel % QUANTISATION_BLOCK):
        return itemsize * numel, 0
    return numel, ceil(numel / QUANTISATION_BLOCK) * FP32 + _TABLE


def adamw(itemsize: int) -> Cost:
    """torch.optim.AdamW with states of ``itemsize`` bytes; the temporary of one tensor is its root of exp_avg_sq."""

    def cost(piece: Piece) -> State:
        size = piece.numel * itemsize
        return State(exp_avg=size, exp_avg_sq=size, step=FP32, temporary=size)

    return cost


def adamw_8bit(itemsize: int, *, flat: bool) -> Cost:
    """AdamW with both moments in 8 bits; the step compiled, without temporaries (to its favour)."""

    def cost(piece: Piece) -> State:
        codes, scales = quantised(piece.numel, itemsize, flat=flat)
        return State(exp_avg=codes, exp_avg_sq=codes, scales=2 * scales, step=FP32)

    return cost


def adam_mini(setup: Setup, layout: Callable[[Anatomy], Layout]) -> Cost:
    """Adam-mini as ``optimizer.step.update`` steps it: exp_avg in its own dtype, exp_avg_sq aligned in fp32."""
    itemsize = DTYPES[setup.stepped_dtype]
    moment = setup.exp_avg_dtype or setup.stepped_dtype

    def cost(piece: Piece) -> State:
        aligned, scales = piece.aligned(layout(piece.anatomy)), 0
        if moment == "int8":
            size, scales = quantised(piece.numel, itemsize, flat=setup.flat)
        else:
            size = piece.numel * DTYPES[moment]
        temporary = _adam_mini_temporary(piece, aligned, itemsize)
        temporary += FP32 * piece.numel if scales else 0  # the first moment, taken out of its codes
        return State(size, aligned * FP32, scales, FP32, temporary)

    return cost


def _adam_mini_temporary(piece: Piece, aligned: int, itemsize: int) -> int:
    """Upper bound of what ``adam_mini_update`` allocates for one tensor, in bytes."""
    numel, mixed = piece.numel, itemsize != FP32
    row = max(1, numel // max(1, piece.shape[0])) if piece.shape else 1
    limit = min(max(numel >> _SHARE, _SMALLEST), _LARGEST)
    window = min(numel, max(limit, row))
    if aligned == numel:  # per element: worked through in windows where there is more than one row
        aligned = window
    copies = FP32 * window if mixed else 0  # a slice of the gradient in fp32
    squares = 2 * FP32 * aligned  # the mean squares, and at most as much again while runs are averaged
    return max(copies + squares, FP32 * aligned + 2 * copies)  # then of the parameter and of the first moment
