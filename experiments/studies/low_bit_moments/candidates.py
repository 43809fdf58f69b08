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

Law = Literal["linear", "square"]
Rounding = Literal["nearest", "stochastic", "carried", "both"]
LAWS: tuple[Law, ...] = ("linear", "square")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "carried", "both")


@dataclass(frozen=True)
class Candidate:
    """One format of a quantised first moment.

    Attributes:
        bits: bits of a code.
        law: "linear": value = c * scale; "square": value = c * |c| * scale.
        rounding: "nearest"; "stochastic" (the expected value is exact); "carried" (nearest, and the rounding error is
            added to the parameter's update, as in ``QuantisedMoment.advance``); "both" (stochastic and carried).
        block: number of elements that share a scale.
        scale: dtype of the scales.
    """

    bits: int
    law: Law
    rounding: Rounding
    block: int
    scale: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"int{self.bits}-{self.law}-{self.rounding}-{self.block}-{self.scale}"

    @property
    def bytes_per_value(self) -> float:
        """Bytes of code and scale per element, for rows that are a multiple of the block size."""
        return self.bits / 8 + (4 if self.scale == "fp32" else 2) / self.block


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
    levels = 2 ** (candidate.bits - 1) - 1
    blocks = torch.nn.functional.pad(m, (0, -n % candidate.block)).view(rows, -1, candidate.block)
    size = blocks.abs()
    unit = size.amax(-1, keepdim=True) / (levels if candidate.law == "linear" else levels**2)
    if candidate.scale == "bf16":
        unit = unit.bfloat16().float()
    x = size * torch.where(unit > 0, 1 / unit, 0.0)
    if candidate.rounding in ("stochastic", "both"):
        u = (hashed(torch.arange(x.numel()), step, seed) >> 8).view(x.shape) * 2.0**-24
        low = x.floor() if candidate.law == "linear" else x.sqrt().floor()
        share = x - low if candidate.law == "linear" else (x - low * low) / (2 * low + 1)
        codes = low + (u < share)
    else:
        codes = x.round() if candidate.law == "linear" else (x - 0.25).clamp(min=0).sqrt().round()
    codes = codes.clamp(max=levels)
    values = (codes if candidate.law == "linear" else codes * codes) * unit * blocks.sign()
    return values.reshape(rows, -1)[:, :n]


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
        if self.candidate.rounding in ("nearest", "stochastic"):
            return exact
        return exact + (exact - self.value) * (beta1 / (1 - beta1))


SCREENED = (
    *(Candidate(4, law, rounding, 64) for law in LAWS for rounding in ROUNDINGS[:3]),
    Candidate(4, "square", "carried", 32, "bf16"),
    Candidate(4, "square", "carried", 128),
    *(Candidate(8, law, rounding, 128) for law in LAWS for rounding in ROUNDINGS[:2]),
    *(Candidate(8, "square", "carried", block) for block in (64, 128, 256)),
)
FAST = tuple(Candidate(4, "square", rounding, 64) for rounding in ("nearest", "carried"))
"""Candidates that also run at a high learning rate, in addition to the shipped formats."""
