"""How large a step each rounding stands, on quadratics of one variable each that share blocks; and how exact it is.

Heavy-ball momentum with beta1 = 0.9 is stable while step size x curvature stays below 2 (1 + beta1) / (1 - beta1) = 38;
gradient descent without momentum below 2. Where rounding feeds its errors back or undoes momentum, the limit falls.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch

from experiments.studies.low_bit_moments.candidates import LAWS, ROUNDINGS, Candidate, Kept

STEPS = (0.1, 0.5, 1.0, 1.9, 2.5, 5.0, 10.0, 20.0, 36.0)
"""Step size x curvature."""
_BETA1 = 0.9
_SHIPPED: tuple[tuple[int, int, Literal["fp32", "bf16"]], ...] = ((4, 32, "bf16"), (8, 128, "fp32"))


def distance(candidate: Candidate | None, step: float, spread: float, noise: float, iterations: int = 400) -> float:
    """Root mean square distance from the minimum over the second half of a run; infinite when it diverges.

    Args:
        candidate: how the moment is kept; None: exactly.
        step: step size x curvature, the same for every variable.
        spread: of the logarithms of the gradients' sizes, within a block.
        noise: of gradients, relative to the gradient at distance 1.
        iterations: how many.
    """
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(spread * torch.randn(64, 256, generator=generator))
    x = torch.randn(64, 256, generator=generator)
    kept, exact = Kept(x.shape, candidate, seed=3) if candidate else None, torch.zeros_like(x)
    squares = []
    for t in range(1, iterations + 1):
        grad = size * (x + noise * torch.randn(x.shape, generator=generator))
        exact = exact * _BETA1 + grad * (1 - _BETA1)
        x = x - step * (kept.advance(grad, _BETA1, t) if kept else exact) / size
        if not x.abs().max() < 1e6:
            return math.inf
        squares.append(x.square().mean().item())
    return math.sqrt(sum(squares[iterations // 2 :]) / (iterations - iterations // 2))


def errors(candidate: Candidate, iterations: int = 300) -> dict[str, float]:
    """How far rounding leads away from exact momentum on a fixed stream of gradients, which no position changes.

    Gradients are noise around a mean of a tenth of it; their sizes spread by column and by element.

    Returns:
        moment: relative error of the stored moment, over all elements; path, own_path: of the sum of all moves, over
        all elements and with every element measured in its own gradients' size.
    """
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    size, mean = torch.exp(draw(1, 256) + 0.5 * draw(256, 256)), 0.1 * draw(256, 256)
    kept = Kept(size.shape, candidate, seed=3)
    exact, path, right, moment = (torch.zeros_like(size) for _ in range(4))
    for t in range(1, iterations + 1):
        grad = size * (mean + draw(256, 256))
        exact = exact * _BETA1 + grad * (1 - _BETA1)
        before = kept.value * _BETA1 + grad * (1 - _BETA1)
        path += kept.advance(grad, _BETA1, t)
        right += exact
        moment = torch.stack([(kept.value - before).norm(), before.norm()])
    off = path - right
    return {
        "moment": round((moment[0] / moment[1]).item(), 4), "path": round((off.norm() / right.norm()).item(), 4),
        "own_path": round(((off / size).norm() / (right / size).norm()).item(), 4),
    }  # fmt: skip


def compared() -> list[Candidate]:
    """Both maps and every rounding, in the blocks that ship."""
    return [
        Candidate(bits, law, rounding, block, scale)
        for bits, block, scale in _SHIPPED for law in LAWS for rounding in ROUNDINGS
    ]  # fmt: skip


def table() -> dict[str, Any]:
    """JSON-able: steps; distances at each by arm and spread (None: diverged), with noise 0.3; errors by arm."""
    rows = []
    for spread in (0.0, 1.0):
        for arm in (None, *(c for c in compared() if c.law == "square")):
            distances = [distance(arm, step, spread, 0.3) for step in STEPS]
            rows.append({
                "arm": arm.name if arm else "exact", "spread": spread,
                "distances": [round(d, 4) if math.isfinite(d) else None for d in distances],
            })  # fmt: skip
    also = (Candidate(4, "square", "stochastic", 64), Candidate(8, "square", "stochastic", 64))
    return {"steps": STEPS, "distances": rows, "errors": {c.name: errors(c) for c in (*compared(), *also)}}
