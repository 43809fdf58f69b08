"""How large a step each rounding stands, on quadratics of one variable each that share blocks.

Heavy-ball momentum with beta1 = 0.9 is stable while step size x curvature stays below 2 (1 + beta1) / (1 - beta1) = 38;
gradient descent without momentum below 2. Where rounding feeds its errors back or undoes momentum, the limit falls.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from experiments.studies.low_bit_moments.candidates import ROUNDINGS, Candidate, Kept

STEPS = (0.1, 0.5, 1.0, 1.9, 2.5, 5.0, 10.0, 20.0, 36.0)
"""Step size x curvature."""
_BETA1 = 0.9


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


def table() -> list[dict[str, Any]]:
    """JSON-able rows: arm, spread, distances (None: diverged) for every step; noise is 0.3."""
    blocks = {4: (32, "bf16"), 8: (128, "fp32")}
    arms = [Candidate(bits, "square", rounding, *blocks[bits]) for bits in blocks for rounding in ROUNDINGS]  # type: ignore[arg-type]
    rows = []
    for spread in (0.0, 1.0):
        for arm in (None, *arms):
            distances = [distance(arm, step, spread, 0.3) for step in STEPS]
            rows.append({
                "arm": arm.name if arm else "exact", "spread": spread,
                "distances": [round(d, 4) if math.isfinite(d) else None for d in distances],
            })  # fmt: skip
    return rows
