"""Measure the largest stable step size of each rounding on quadratics, and the error of each rounding.

Every variable has its own one-dimensional quadratic, and variables share quantisation blocks. Heavy-ball momentum with
beta1 = 0.9 is stable while step size x curvature is below 2 (1 + beta1) / (1 - beta1) = 38, and gradient descent
without momentum while it is below 2. A rounding that feeds its errors back or undoes momentum lowers the limit.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from experiments.studies.low_bit_moments.candidates import LAWS, QUIETER, ROUNDINGS, Candidate, QuantisedMoment, Scale

STEPS = (0.1, 0.5, 1.0, 1.9, 2.5, 5.0, 10.0, 20.0, 36.0)
"""Values of step size x curvature."""
_BETA1 = 0.9
_SHIPPED: tuple[tuple[int, int, Scale], ...] = ((4, 32, "bf16"), (8, 128, "fp32"))


def distance(candidate: Candidate | None, step: float, spread: float, noise: float, iterations: int = 400) -> float:
    """Return the root mean square distance from the minimum over the second half of a run; infinite if it diverges.

    Args:
        candidate: format of the moment; None for an exact moment.
        step: step size x curvature, the same for every variable.
        spread: standard deviation of the logarithm of the gradients' sizes.
        noise: standard deviation of the gradient noise, relative to the gradient at distance 1.
        iterations: number of steps.
    """
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(spread * torch.randn(64, 256, generator=generator))
    x = torch.randn(64, 256, generator=generator)
    quantised = QuantisedMoment(x.shape, candidate, seed=3) if candidate else None
    exact = torch.zeros_like(x)
    squares = []
    for t in range(1, iterations + 1):
        grad = size * (x + noise * torch.randn(x.shape, generator=generator))
        exact = exact * _BETA1 + grad * (1 - _BETA1)
        x = x - step * (quantised.advance(grad, _BETA1, t) if quantised else exact) / size
        if not x.abs().max() < 1e6:
            return math.inf
        squares.append(x.square().mean().item())
    return math.sqrt(sum(squares[iterations // 2 :]) / (iterations - iterations // 2))


def errors(candidate: Candidate, iterations: int = 300) -> dict[str, float]:
    """Measure the error of a rounding on a fixed sequence of gradients that does not depend on the parameters.

    The gradients are noise around a mean of a tenth of the noise. Their sizes vary by column and by element.

    Returns:
        moment: relative error of the stored moment over all elements. path: relative error of the sum of all updates
        over all elements. own_path: the same sum's relative error with each element in units of its gradient's size.
    """
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    size, mean = torch.exp(draw(1, 256) + 0.5 * draw(256, 256)), 0.1 * draw(256, 256)
    quantised = QuantisedMoment(size.shape, candidate, seed=3)
    exact, path, exact_path, moment = (torch.zeros_like(size) for _ in range(4))
    for t in range(1, iterations + 1):
        grad = size * (mean + draw(256, 256))
        exact = exact * _BETA1 + grad * (1 - _BETA1)
        before = quantised.value * _BETA1 + grad * (1 - _BETA1)
        path += quantised.advance(grad, _BETA1, t)
        exact_path += exact
        moment = torch.stack([(quantised.value - before).norm(), before.norm()])
    off = path - exact_path
    return {
        "moment": round((moment[0] / moment[1]).item(), 4),
        "path": round((off.norm() / exact_path.norm()).item(), 4),
        "own_path": round(((off / size).norm() / (exact_path / size).norm()).item(), 4),
    }


def kept(candidate: Candidate, steps: int = 10) -> float:
    """Return the mean moment after some steps without gradients, divided by the exact one; 1 for an unbiased rounding.

    The moments begin at the value of code 1 in blocks whose scale a single element holds up, so they are as small as a
    code can be.
    """
    quantised = QuantisedMoment(torch.Size((20000, 32)), candidate, seed=1)
    start = 1 / 49
    quantised.value[:, ::16], quantised.value[:, 1:16], quantised.value[:, 17:] = 1.0, start, start
    for t in range(1, steps + 1):
        grad = torch.zeros(20000, 32)
        grad[:, ::16] = 1.0
        quantised.advance(grad, _BETA1, t)
    return round(quantised.value[:, 1:16].mean().item() / (start * _BETA1**steps), 3)


def quieter() -> list[dict[str, Any]]:
    """Return name, bytes, errors, ``kept`` and distances (noise 0.3, spread 1) of the attempts at a quieter int4."""
    return [
        {
            "arm": arm.name,
            "bytes": arm.bytes_per_value,
            **errors(arm),
            "kept": kept(arm),
            "distances": [
                round(d, 4) if math.isfinite(d) else None for d in (distance(arm, s, 1.0, 0.3) for s in STEPS)
            ],
        }
        for arm in QUIETER
    ]


def compared() -> list[Candidate]:
    """Return candidates with both maps and every rounding, in the shipped block sizes."""
    return [
        Candidate(bits, law, rounding, block, scale)
        for bits, block, scale in _SHIPPED
        for law in LAWS
        for rounding in ROUNDINGS
    ]


def table() -> dict[str, Any]:
    """Return the study's results as a JSON-able document.

    It contains the steps, the distances at each step by arm and spread with noise 0.3 (None for divergence), the
    errors by arm, and the attempts at a quieter int4.
    """
    rows = []
    for spread in (0.0, 1.0):
        for arm in (None, *(c for c in compared() if c.law == "square")):
            distances = [distance(arm, step, spread, 0.3) for step in STEPS]
            rows.append(
                {
                    "arm": arm.name if arm else "exact",
                    "spread": spread,
                    "distances": [round(d, 4) if math.isfinite(d) else None for d in distances],
                }
            )
    also = (Candidate(4, "square", "stochastic", 64), Candidate(8, "square", "stochastic", 64))
    found = {c.name: errors(c) for c in (*compared(), *also)}
    return {"steps": STEPS, "distances": rows, "errors": found, "quieter": quieter()}
