"""Adam on many quadratics at once: every problem with every learning rate of a grid, to a zero rate at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8
ELEMENTWISE = "adamw"


@dataclass(frozen=True)
class Sharing:
    """A form of the second moment for d elements.

    Attributes:
        name: its name.
        blocks: number of equal blocks with one scalar each; d for AdamW, 1 for one scalar.
        shape: (rows, columns) of a matrix whose second moment is factored; None otherwise.
        by_column: whether the blocks are the columns of ``shape`` instead of consecutive elements.
    """

    name: str
    blocks: int = 1
    shape: tuple[int, int] | None = None
    by_column: bool = False

    def means(self, squares: Tensor) -> tuple[Tensor, ...]:
        """Return what the optimizer stores: block means, or row means and column means, of [P, d, R]."""
        problems, d, rates = squares.shape
        if self.shape is not None:
            grid = squares.view(problems, *self.shape, rates)
            column = grid.mean(1, keepdim=True)
            return (column,) if self.by_column else (grid.mean(2, keepdim=True), column)
        return (squares.view(problems, self.blocks, d // self.blocks, rates).mean(2, keepdim=True),)

    def spread(self, stored: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Return every element's second moment, [P, d, R], from what is stored."""
        problems, d, rates = shape
        if self.shape is None:
            size = d // self.blocks
            return stored[0].expand(problems, self.blocks, size, rates).reshape(shape)
        if self.by_column:
            return stored[0].expand(problems, *self.shape, rates).reshape(shape)
        row, column = stored
        return (row * column / row.mean(1, keepdim=True).clamp_min(1e-300)).reshape(shape)


def noise_at(matrices: Tensor, roots: Tensor, scales: Tensor, seeds: Sequence[int], step: int) -> Tensor:
    """Return the gradient noise of one step, [P, d, 1]: the same for all methods and learning rates."""
    draws = torch.stack(
        [torch.randn(matrices.shape[-1], generator=torch.Generator().manual_seed(s * 100_003 + step)) for s in seeds]
    ).to(matrices)
    return (scales[:, None] * (roots @ draws[:, :, None])[:, :, 0])[:, :, None]


def descend(
    matrices: Tensor,
    starts: Tensor,
    sharing: Sharing,
    rates: Tensor,
    steps: int,
    betas: tuple[float, float],
    *,
    decay: bool = True,
    noise: Callable[[int], Tensor] | None = None,
    curve: bool = False,
) -> Tensor:
    """Minimise with Adam's step under a form of sharing; without weight decay, all rates of a grid side by side.

    Args:
        matrices: H of every problem, [P, d, d].
        starts: S starts of every problem, [P, d, S].
        sharing: the form of the second moment.
        rates: first learning rates, [R].
        steps: number of steps.
        betas: Adam's.
        decay: whether the rate falls linearly to zero; otherwise it stays.
        noise: step -> what is added to the gradients, [P, d, 1].
        curve: whether to return the values after every step.

    Returns:
        f(end) / f(start), averaged over starts, [P, R], or with ``curve`` [P, R, steps + 1]; infinite where a start
        diverged.
    """
    count = starts.shape[2]
    x = starts.repeat_interleave(len(rates), dim=2)  # [P, d, S R], the rates innermost
    rates = rates.repeat(count)
    first = _values(matrices, x)
    momentum, stored = torch.zeros_like(x), tuple(torch.zeros_like(s) for s in sharing.means(x))
    values = [first]
    for step in range(steps):
        gradient = matrices @ x
        if noise is not None:
            gradient = gradient + noise(step)
        momentum.lerp_(gradient, 1 - betas[0])
        for total, now in zip(stored, sharing.means(gradient.square()), strict=True):
            total.lerp_(now, 1 - betas[1])
        corrected = [s / (1 - betas[1] ** (step + 1)) for s in stored]
        rate = rates * ((1 - step / steps) if decay else 1.0) / (1 - betas[0] ** (step + 1))
        x = x - rate * momentum / (sharing.spread(corrected, x.shape).sqrt() + EPS)
        if curve:
            values.append(_values(matrices, x))
    ends = torch.stack(values if curve else [_values(matrices, x)], dim=-1) / first[:, :, None]
    mean = _finite(ends.unflatten(1, (count, -1)).mean(1))
    return mean if curve else mean[:, :, 0]


def _values(matrices: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x)).sum(1)


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=math.inf, posinf=math.inf)


def gradient_descent(matrix: Tensor, start: Tensor, rates: Tensor, steps: int, *, decay: bool = False) -> Tensor:
    """Minimise one quadratic by gradient descent, with one column of rates per run.

    Args:
        matrix: H, [d, d].
        start: [d].
        rates: learning rate of every element, [d or 1, R].
        steps: number of steps.
        decay: whether the rates fall linearly to zero.

    Returns:
        f / f(start) before and after every step, [R, steps + 1]; infinite where it diverged.
    """
    x = start[:, None].expand(-1, rates.shape[1]).contiguous()
    values = [_values(matrix[None], x[None])[0]]
    for step in range(steps):
        x = x - rates * ((1 - step / steps) if decay else 1.0) * (matrix @ x)
        values.append(_values(matrix[None], x[None])[0])
    return _finite(torch.stack(values, dim=-1) / values[0][:, None])


@dataclass(frozen=True)
class Reached:
    """How many steps a method needs on one problem, at its best learning rate for that number.

    Attributes:
        steps: the number, interpolated between budgets; None if the largest budget does not suffice.
        rate: the best learning rate at the budget that sufficed.
        inside: whether that rate is strictly inside the grid.
    """

    steps: float | None
    rate: float | None
    inside: bool


def steps_to(
    matrices: Tensor,
    starts: Tensor,
    sharing: Sharing,
    rates: Tensor,
    betas: tuple[float, float],
    tolerance: float,
    budgets: Sequence[int],
    noise: Callable[[Sequence[int]], Callable[[int], Tensor]] | None = None,
) -> list[Reached]:
    """Return for every problem the smallest budget in which some rate, decaying to zero, brings f to the tolerance.

    Between two budgets log f is interpolated over log steps. Every method searches the same grid of rates anew for
    every budget.

    Args:
        matrices: [P, d, d].
        starts: [P, d, S]; f is averaged over them.
        sharing: the form of the second moment.
        rates: the grid of first learning rates, ascending, [R].
        betas: Adam's.
        tolerance: share of f(start) to reach.
        budgets: numbers of steps, ascending.
        noise: positions of problems -> their noise, as in ``descend``.
    """
    out: list[Reached] = [Reached(None, None, False)] * len(matrices)
    left, before = list(range(len(matrices))), dict.fromkeys(range(len(matrices)), (1.0, 1.0))
    for budget in budgets:
        if not left:
            break
        index = torch.tensor(left)
        ends = descend(
            matrices[index],
            starts[index],
            sharing,
            rates,
            budget,
            betas,
            noise=None if noise is None else noise(left),
        )
        best, where = ends.min(dim=1)
        still = []
        for i, value, at in zip(left, best.tolist(), where.tolist(), strict=True):
            if value <= tolerance:
                inside = 0 < at < len(rates) - 1
                out[i] = Reached(_between(before[i], (budget, value), tolerance), float(rates[at]), inside)
            else:
                before[i] = (float(budget), min(value, 1.0))
                still.append(i)
        left = still
    return out


def _between(low: tuple[float, float], high: tuple[float, float], tolerance: float) -> float:
    """Return the steps at which the line between two points (steps, f), both logarithmic, has the tolerance."""
    span = math.log(low[1]) - math.log(max(high[1], 1e-300))
    share = (math.log(low[1]) - math.log(tolerance)) / span if span > 0 else 1.0
    return float(math.exp(math.log(low[0]) + share * (math.log(high[0]) - math.log(low[0]))))
