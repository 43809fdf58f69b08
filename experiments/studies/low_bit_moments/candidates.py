"""A slow, parametrised quantiser of first moments; the shipped formats are special cases of it.

The map of codes, the rounding, the block size and the dtype of the scales can vary. ``optimizer.step.moments`` has the
formats that were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optimizer.step.rounding import hashed

Law = Literal["linear", "square", "chosen"]
Rounding = Literal["nearest", "stochastic", "carried", "both", "rotated"]
Scale = Literal["fp32", "bf16", "fp8"]
LAWS: tuple[Law, ...] = ("linear", "square")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "carried", "both")
_ROTATION = 0x6A09E667  # sqrt(2) - 1, times 2^32
_SCALE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Candidate:
    """One format of a quantised first moment.

    Attributes:
        bits: bits of a code.
        law: "linear": value = c * scale; "square": value = c * |c| * scale; "chosen": in each block the one of the two
            with the smaller variance of stochastic rounding, which a scale's unused sign bit can store.
        rounding: "nearest"; "stochastic" (the expected value is exact); "carried" (nearest, and the rounding error is
            added to the parameter's update, as in ``QuantisedMoment.advance``); "both" (stochastic and carried);
            "rotated" (stochastic, with one random number per element to which every step adds sqrt(2) - 1, modulo 1).
        block: number of elements that share a scale.
        scale: dtype of the scales. "fp8" has three bits of mantissa, rounded up, and all exponents of fp32, so eight
            bits can at best do as well.
    """

    bits: int
    law: Law
    rounding: Rounding
    block: int
    scale: Scale = "fp32"

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"int{self.bits}-{self.law}-{self.rounding}-{self.block}-{self.scale}"

    @property
    def bytes_per_value(self) -> float:
        """Bytes of code and scale per element, for rows that are a multiple of the block size."""
        return self.bits / 8 + _SCALE_BYTES[self.scale] / self.block


def rounded(m: Tensor, candidate: Candidate, step: int, seed: int) -> Tensor:
    """Quantise moments and return the dequantised values.

    Args:
        m: fp32 [rows, n], the moments.
        candidate: the format.
        step: the optimizer's step, for stochastic rounding.
        seed: the tensor's seed, for stochastic rounding.

    Returns:
        fp32 [rows, n].
    """
    rows, n = m.shape
    blocks = torch.nn.functional.pad(m, (0, -n % candidate.block)).view(rows, -1, candidate.block)
    if candidate.law == "chosen":
        (linear, noise), (square, other) = (_by_law(blocks, candidate, law, step, seed) for law in LAWS)
        values = torch.where(noise < other, linear, square)
    else:
        values, _ = _by_law(blocks, candidate, candidate.law, step, seed)
    return values.reshape(rows, -1)[:, :n]


def _by_law(blocks: Tensor, candidate: Candidate, law: Law, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rounded blocks, and the variance of stochastic rounding summed over each block, [rows, blocks, 1]."""
    levels, size = 2 ** (candidate.bits - 1) - 1, blocks.abs()
    unit = _scale(size.amax(-1, keepdim=True) / (levels if law == "linear" else levels**2), candidate.scale)
    x = size * torch.where(unit > 0, 1 / unit, 0.0)
    low = x.floor() if law == "linear" else x.sqrt().floor()
    below, gap = (low, 1.0) if law == "linear" else (low * low, 2 * low + 1)
    share = (x - below) / gap
    if candidate.rounding in ("stochastic", "both", "rotated"):
        codes = low + (_uniform(x, step, seed, rotated=candidate.rounding == "rotated") < share)
    else:
        codes = x.round() if law == "linear" else (x - 0.25).clamp(min=0).sqrt().round()
    codes = codes.clamp(max=levels)
    values = (codes if law == "linear" else codes * codes) * unit * blocks.sign()
    return values, ((gap * unit).square() * share * (1 - share)).sum(-1, keepdim=True)


def _uniform(x: Tensor, step: int, seed: int, *, rotated: bool) -> Tensor:
    """Return numbers in [0, 1) of every element of ``x``, fp32: one hash per step, or one that rotates."""
    numbers = hashed(torch.arange(x.numel()), 0 if rotated else step, seed)
    if rotated:
        numbers = numbers.add_(step * _ROTATION).bitwise_and_(2**32 - 1)
    return (numbers >> 8).view(x.shape) * 2.0**-24


def _scale(exact: Tensor, dtype: Scale) -> Tensor:
    """Round scales as they are stored; fp32."""
    if dtype == "bf16":
        return exact.bfloat16().float()
    dropped = 20  # mantissa bits that "fp8" does not have
    return (
        ((exact.view(torch.int32) + (1 << dropped) - 1) >> dropped << dropped).view(torch.float32)
        if dtype == "fp8"
        else exact
    )


class QuantisedMoment:
    """The first moment of one matrix in a candidate's format.

    A rounding error e of the moment changes the parameter by beta1 / (1 - beta1) * e over all later steps, before the
    step size. "carried" corrects the parameter by that sum at once. The parameter minus the remaining effect of its
    moment then moves exactly with the gradient. This is error feedback with the weights as the accumulator.
    """

    def __init__(self, shape: torch.Size, candidate: Candidate, seed: int) -> None:
        self.candidate, self.seed = candidate, seed
        self.value = torch.zeros(shape)

    def advance(self, grad: Tensor, beta1: float, step: int) -> Tensor:
        """Update the moment with a gradient; return the parameter's update before the step size."""
        exact = self.value * beta1 + grad * (1 - beta1)
        self.value = rounded(exact, self.candidate, step, self.seed)
        if self.candidate.rounding in ("nearest", "stochastic", "rotated"):
            return exact
        return exact + (exact - self.value) * (beta1 / (1 - beta1))


SCREENED = (
    *(Candidate(4, law, rounding, 64) for law in LAWS for rounding in ROUNDINGS[:3]),
    Candidate(4, "square", "carried", 32, "bf16"),
    Candidate(4, "square", "carried", 128),
    *(Candidate(8, law, rounding, 128) for law in LAWS for rounding in ROUNDINGS[:2]),
    *(Candidate(8, "square", "carried", block) for block in (64, 128, 256)),
)
QUIETER = (
    Candidate(4, "square", "stochastic", 32, "bf16"),
    Candidate(4, "square", "stochastic", 16, "fp8"),
    Candidate(4, "chosen", "stochastic", 32, "bf16"),
    Candidate(4, "square", "rotated", 32, "bf16"),
)
"""The shipped int4 and three attempts at less noise in the same bytes."""
FAST = tuple(Candidate(4, "square", rounding, 64) for rounding in ("nearest", "carried"))
"""Candidates that also run at a high learning rate, in addition to the shipped formats."""
