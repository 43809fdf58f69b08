"""MicroAdam (arXiv 2405.15593): Adam's moments from the largest entries of the last gradients; from the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .parts import Exact
from .rival import Group, Setup

LEVELS = 15
"""Steps of a 4-bit number."""


class MicroAdam(Exact):
    """Adam whose moments are recomputed at each step from a window of sparse gradients, with error feedback.

    At each step, the error of the last one is added to the gradient, the largest entries go into the window and the
    rest, in 4 bits, is the next error. The moments are sums over the window with weights ``beta ** age``. A parameter
    that has no entry in the window does not move.

    Indices are int16 within blocks of at most 2**15 elements, values are bfloat16, and an error has the smallest and
    the largest value of each ``bucket`` of elements as float32 (the authors' code: bfloat16). Weight decay is
    decoupled.

    Args:
        groups: parameter groups with ``weight_decay``.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        window: number of gradients that are kept.
        density: share of entries of a gradient that are kept, rounded up in each block.
        block: elements within which the largest entries are found, at most 2**15.
        bucket: elements of one range of quantized errors.
    """

    def __init__(
        self,
        groups: list[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        window: int = 10,
        density: float = 0.01,
        block: int = 2**15,
        bucket: int = 100_000,
    ) -> None:
        options = {"window": window, "density": density, "block": block, "bucket": bucket}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **options})

    def update(self, parameter: Tensor, grad: Tensor, group: Group) -> None:
        """Update one parameter; all that is kept of its gradient is flat."""
        grad, state = grad.flatten(), self.state[parameter]
        size, bucket = grad.numel(), group["bucket"]
        if not state:
            kept = sum(math.ceil(group["density"] * part) for part in _lengths(size, group["block"]))
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["indices"] = torch.zeros(group["window"], kept, dtype=torch.int16, device=grad.device)
            state["values"] = torch.zeros(group["window"], kept, dtype=torch.bfloat16, device=grad.device)
            state["error"] = torch.zeros(math.ceil(size / 2), dtype=torch.uint8, device=grad.device)
            state["ranges"] = torch.zeros(2, len(_lengths(size, bucket)), device=grad.device)
        state["step"] += 1
        step = int(state["step"])
        whole = grad + unquantized(state["error"], state["ranges"], size, bucket).to(grad.dtype)
        slot, places = (step - 1) % group["window"], largest(whole, group["density"], group["block"])
        state["indices"][slot] = (places % group["block"]).to(torch.int16)
        state["values"][slot] = whole[places].to(torch.bfloat16)
        whole[places] = 0
        state["error"], state["ranges"] = quantized(whole.float(), bucket)
        first, second = self._moments(state, step, size, group, grad.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_((first / (group["eps"] + second.sqrt())).view_as(parameter), alpha=-group["lr"])

    def _moments(
        self, state: dict[str, Tensor], step: int, size: int, group: Group, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return both moments, [n], with corrected bias, from the gradients in the window."""
        used = min(step, group["window"])
        ages = (step - 1 - torch.arange(used, device=state["values"].device)) % group["window"]
        values = state["values"][:used].to(dtype)
        places = (state["indices"][:used].long() + _offsets(size, group)).flatten()
        moments = []
        for beta, powers in zip(group["betas"], (values, values.square()), strict=True):
            weighted = powers * (beta ** ages.to(dtype)).unsqueeze(1) * ((1 - beta) / (1 - beta**step))
            moments.append(values.new_zeros(size).index_add_(0, places, weighted.flatten()))
        return moments[0], moments[1]


def _lengths(size: int, block: int) -> list[int]:
    """Return the lengths of the blocks of a tensor of ``size`` elements; the last one may be shorter."""
    return [min(block, size - start) for start in range(0, size, block)]


def _offsets(size: int, group: Group) -> Tensor:
    """Return the first element of the block to which each kept entry belongs, int64 [kept]."""
    block, density = group["block"], group["density"]
    kept = [math.ceil(density * length) for length in _lengths(size, block)]
    return torch.repeat_interleave(torch.arange(len(kept)) * block, torch.tensor(kept))


def largest(values: Tensor, density: float, block: int) -> Tensor:
    """Return the places of the largest magnitudes in each block of [n], in ascending order within a block."""
    places = []
    for number, part in enumerate(values.abs().split(block)):
        top = part.topk(math.ceil(density * part.numel()), sorted=False).indices
        places.append(top.sort().values + number * block)
    return torch.cat(places)


def quantized(values: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Return 4-bit numbers, two in each byte [n / 2, rounded up], and the ranges of buckets, [2, buckets]."""
    codes, ranges = [], []
    for part in values.split(bucket):
        low, high = part.min(), part.max()
        unit = (high - low) / LEVELS
        code = ((part - low) / unit + 0.5).floor().clamp(0, LEVELS) if unit > 0 else torch.zeros_like(part)
        codes.append(code.to(torch.uint8))
        ranges.append(torch.stack([low, high]))
    whole = torch.cat(codes)
    even, odd = whole[::2].clone(), whole[1::2]
    even[: odd.numel()] |= odd << 4
    return even, torch.stack(ranges, 1)


def unquantized(packed: Tensor, ranges: Tensor, size: int, bucket: int) -> Tensor:
    """Return the values [n] of what ``quantized`` returned."""
    codes = torch.stack([packed & LEVELS, packed >> 4], 1).flatten()[:size].to(ranges.dtype)
    parts = [
        part * ((high - low) / LEVELS) + low for part, (low, high) in zip(codes.split(bucket), ranges.T, strict=True)
    ]
    return torch.cat(parts)


def microadam(setup: Setup) -> torch.optim.Optimizer:
    """Make it with the run's betas and weight decay, and the paper's window of 10 gradients of 1 % density."""
    return MicroAdam(setup.groups, setup.lr, setup.betas)
