"""Parts ``quadratics``, ``diagonal_gain``, ``one_scalar`` and ``matrices``: quadratic problems."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.studies.paper_hessian import numbers, real_blocks
from experiments.studies.paper_hessian.descent import (
    ELEMENTWISE,
    Reached,
    Sharing,
    descend,
    gradient_descent,
    noise_at,
    steps_to,
)
from experiments.studies.paper_hessian.problems import (
    Problem,
    fit_problems,
    held_out_problems,
    log_uniform,
    rotation,
    starts_at,
    with_spectrum,
)
from experiments.studies.paper_hessian.store import Cell, Part, settings_of
from hessian import preconditioned_ratio, tau

SPECTRA = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
"""The eigenvalues of the paper's three blocks, from which 30 are drawn for each."""
DRAWN = "three blocks"
"""The problem whose curves are stored, too."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the four parts.

    Attributes:
        block: size of each of the three blocks.
        steps: steps of the three-block runs.
        three_block_seeds: seeds of the three-block quadratic.
        adam_betas: (beta1, beta2) of its Adam arms.
        gain_sizes: dimensions at which r and tau are computed.
        gain_conditions: condition numbers there.
        gain_amounts: amounts of rotation there.
        gain_seeds: number of seeds there.
        fit_sizes: dimensions of the problems that fit the threshold.
        fit_conditions: their condition numbers.
        fit_amounts: their amounts of rotation.
        seeds: seeds of every family of problems.
        real_seeds: seeds of the tiny models whose blocks are problems.
        real_steps: training steps of the tiny models.
        shrink: divisor of the held-out problems' sizes.
        rate_exponents: first and last k of the grid of learning rates 2^(k / 2).
        budgets: largest budget of steps is 8 * 2^(budgets / 2).
        modes: (beta1, beta2, tolerance) of every comparison; the first is the one that decides.
        matrix_side: rows and columns of the matrix-shaped problems.
    """

    block: int = 30
    steps: int = 200
    three_block_seeds: int = 10
    adam_betas: tuple[tuple[float, float], ...] = ((0.0, 0.99), (0.0, 0.999), (0.9, 0.95))
    gain_sizes: tuple[int, ...] = (8, 16, 32, 64)
    gain_conditions: tuple[float, ...] = (10.0, 100.0, 1000.0, 10000.0)
    gain_amounts: tuple[float, ...] = (0.0, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 10.0)
    gain_seeds: int = 20
    fit_sizes: tuple[int, ...] = (16, 32)
    fit_conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    fit_amounts: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 10.0)
    seeds: int = 4
    real_seeds: tuple[int, ...] = (0, 1)
    real_steps: int = 1000
    shrink: int = 1
    rate_exponents: tuple[int, int] = (-16, 20)
    budgets: int = 16
    modes: tuple[tuple[float, float, float], ...] = ((0.9, 0.95, 1e-4), (0.0, 0.95, 1e-4))
    matrix_side: int = 8


PROFILES = {
    "full": Settings(),
    "smoke": Settings(
        block=6,
        steps=20,
        three_block_seeds=2,
        adam_betas=((0.0, 0.99),),
        gain_sizes=(8,),
        gain_conditions=(10.0,),
        gain_amounts=(0.0, 10.0),
        gain_seeds=2,
        fit_sizes=(8,),
        fit_conditions=(1.0, 10.0, 1000.0),
        fit_amounts=(0.0, 10.0),
        seeds=2,
        real_seeds=(0,),
        real_steps=4,
        shrink=4,
        rate_exponents=(-14, 10),
        budgets=10,
        modes=((0.9, 0.95, 1e-2), (0.0, 0.95, 1e-2)),
        matrix_side=4,
    ),
}


def parts(profile: str, cache: Path) -> list[Part]:
    """Return the five parts of a profile.

    Args:
        profile: key of ``PROFILES``.
        cache: folder of the tiny models' Gauss-Newton matrices.
    """
    s = PROFILES[profile]
    three = [Cell(f"seed {k}", 2.0, lambda k=k: three_blocks(s, k)) for k in range(s.three_block_seeds)]
    sweep = itertools.product(s.gain_sizes, s.gain_conditions)
    gains = [Cell(f"d {d}, condition {c:g}", 1.0 + d / 16, lambda d=d, c=c: diagonal_gain(s, d, c)) for d, c in sweep]
    problems = {f"fit, seed {k}": (20.0, lambda k=k: _fit(s, k)) for k in range(s.seeds)}
    problems |= {f"held out, seed {k}": (40.0, lambda k=k: _held_out(s, k)) for k in range(s.seeds)}
    problems |= {
        f"real, seed {k}": (60.0, lambda k=k: real_blocks.problems(profile, s.real_steps, k, cache))
        for k in s.real_seeds
    }
    one = [Cell(name, seconds, lambda make=make: compared(s, make())) for name, (seconds, make) in problems.items()]
    added = [Cell(name, 2.0, lambda make=make: steps_of(s, make())) for name, (_, make) in problems.items()]
    shaped = [Cell(f"seed {k}", 30.0, lambda k=k: matrices(s, k)) for k in range(s.seeds)]
    shaped += [Cell(f"real, seed {k}", 60.0, lambda k=k: real_matrices(s, profile, k, cache)) for k in s.real_seeds]
    plain = settings_of(s)
    return [
        Part("quadratics", plain, three),
        Part("diagonal_gain", plain, gains),
        Part("one_scalar", plain, one),
        Part("added_number", plain, added),
        Part("matrices", plain, shaped),
    ]


def _fit(settings: Settings, seed: int) -> list[Problem]:
    return fit_problems(seed, settings.fit_sizes, settings.fit_conditions, settings.fit_amounts)


def _held_out(settings: Settings, seed: int) -> list[Problem]:
    return held_out_problems(seed, settings.shrink)


# ------------------------------------------------------------------------------------------- the three-block quadratic


def three_blocks(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """Minimise the paper's quadratic, its blocks alone, and one dense matrix with the same eigenvalues.

    Every arm searches as many learning rates as every other. Blockwise gradient descent scales the best constant rate
    2 / (largest + smallest eigenvalue) of every block by one common searched factor.

    Returns:
        One row per problem, schedule and arm: log10 of f(end) / f(start), whether the best rate is inside the grid,
        and, of the three blocks at constant rates, the curve at the best rate.
    """
    generator = torch.Generator().manual_seed(seed)
    size, values, blocks = settings.block, [], []
    for spectrum in SPECTRA:
        drawn = torch.tensor(spectrum, dtype=torch.float64)[torch.randint(3, (size,), generator=generator)]
        values.append(drawn)
        blocks.append(with_spectrum(drawn, rotation(size, 10.0, generator)))
    dense = with_spectrum(torch.cat(values), rotation(3 * size, 10.0, generator))
    start = torch.randn(3 * size, generator=generator, dtype=torch.float64)
    rows = _arms(settings, DRAWN, torch.block_diag(*blocks), start, blocks)
    rows += _arms(settings, "one dense block, all eigenvalues", dense, start, [dense])
    for number, block in enumerate(blocks):
        where = slice(number * size, (number + 1) * size)
        rows += _arms(settings, f"block {number + 1} alone", block, start[where], [block])
    return rows


def _arms(
    settings: Settings, problem: str, matrix: Tensor, start: Tensor, blocks: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Run every arm on one problem under both schedules."""
    rows = []
    # Gradient descent diverges just above its best rate, so its grid is finer there; all grids have 37 rates.
    factors = 2.0 ** (torch.arange(-20, 17, dtype=torch.float64) / 8)
    rates = 2.0 ** (torch.arange(-26, 11, dtype=torch.float64) / 2)
    best_rates = [2 / (e[-1] + e[0]) for e in map(torch.linalg.eigvalsh, blocks)]
    blockwise = torch.cat([torch.full((len(b),), float(r)) for b, r in zip(blocks, best_rates, strict=True)])
    whole = torch.linalg.eigvalsh(matrix)
    for decay in (False, True):
        schedule = "linear to zero" if decay else "constant"
        single = gradient_descent(
            matrix, start, (2 / (whole[-1] + whole[0]) * factors)[None], settings.steps, decay=decay
        )
        curves = {"gradient descent, one rate": single}
        if len(blocks) > 1:
            each = blockwise.to(matrix)[:, None] * factors
            curves["gradient descent, best rate per block"] = gradient_descent(
                matrix, start, each, settings.steps, decay=decay
            )
        for betas in settings.adam_betas:
            for name, count in (("Adam", len(matrix)), ("Adam-mini", len(blocks))):
                found = descend(
                    matrix[None],
                    start[None, :, None],
                    Sharing(name, count),
                    rates,
                    settings.steps,
                    betas,
                    decay=decay,
                    curve=True,
                )
                curves[f"{name}, betas {betas[0]:g}, {betas[1]:g}"] = found[0]
        whole_curve = problem == DRAWN and not decay
        rows += [
            {"problem": problem, "schedule": schedule, **_best(arm, curve, whole_curve)}
            for arm, curve in curves.items()
        ]
    return rows


def _best(arm: str, curves: Tensor, with_curve: bool) -> dict[str, Any]:
    """Return the end, and the curve if wanted, at the rate with the lowest end; curves are [R, steps + 1]."""
    at = int(curves[:, -1].argmin())
    steps = torch.linspace(0, curves.shape[1] - 1, min(41, curves.shape[1])).long()
    logs = curves[at].clamp_min(1e-300).log10()
    return {
        "arm": arm,
        "end": float(logs[-1]),
        "inside": 0 < at < len(curves) - 1,
        "curve": [round(value, 2) for value in logs[steps].tolist()] if with_curve else [],
    }


# ----------------------------------------------------------------------------------------------------- r against tau


def diagonal_gain(settings: Settings, d: int, condition: float) -> list[dict[str, Any]]:
    """Compute r and tau of random matrices, from diagonal to fully mixed; one row per amount of rotation.

    Returns:
        Rows with lists over seeds: ``tau``; log10 of r for D = diag(H) (``r``), for the denominators of Adam's first
        step, the absolute gradient at a standard normal point (``r_first``), and for its mean square (``r_mean``).
    """
    rows = []
    for amount in settings.gain_amounts:
        found: dict[str, list[float]] = {"tau": [], "r": [], "r_first": [], "r_mean": []}
        for seed in range(settings.gain_seeds):
            generator = torch.Generator().manual_seed(seed)
            matrix = with_spectrum(log_uniform(d, condition, generator), rotation(d, amount, generator))
            gradient = (matrix @ torch.randn(d, generator=generator, dtype=torch.float64)).abs()
            found["tau"].append(tau(matrix))
            found["r"].append(math.log10(preconditioned_ratio(matrix)))
            found["r_first"].append(-numbers.gain(matrix, gradient.clamp_min(1e-12)))
            found["r_mean"].append(-numbers.gain(matrix, numbers.expected_v(matrix).sqrt()))
        rounded = {key: [float(f"{x:.3g}") for x in values] for key, values in found.items()}
        rows.append({"amount": amount, **rounded})
    return rows


# ---------------------------------------------------------------------------- where one scalar per block loses


def compared(settings: Settings, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Count the steps of AdamW and of one scalar per block on every problem.

    Returns:
        One row per problem: kind, label, d, the numbers of ``numbers.NAMES``, and for every mode and arm the steps to
        the tolerance (None if the largest budget does not suffice) and whether the best rate is inside the grid.
    """
    tolerance = settings.modes[0][2]
    rows = [
        {"kind": p.kind, "label": p.label, "d": len(p.matrix), "numbers": numbers.of_problem(p, tolerance), "steps": {}}
        for p in problems
    ]
    for group in _groups(problems):
        chosen = [problems[i] for i in group]
        forms = [Sharing(ELEMENTWISE, len(chosen[0].matrix)), Sharing("one scalar", chosen[0].blocks)]
        for mode, form, found in _all_modes(settings, chosen, forms):
            for i, reached in zip(group, found, strict=True):
                rows[i]["steps"].setdefault(mode, {})[form] = _row(reached)
    return rows


def steps_of(settings: Settings, problems: Sequence[Problem]) -> list[list[list[float]]]:
    """Return ``numbers.steps_of_problem`` of every problem at the deciding tolerance."""
    return [numbers.steps_of_problem(problem, settings.modes[0][2]) for problem in problems]


def _groups(problems: Sequence[Problem]) -> list[list[int]]:
    """Return positions of problems that can run side by side."""
    found: dict[tuple[int, int, bool], list[int]] = {}
    for i, p in enumerate(problems):
        found.setdefault((len(p.matrix), p.blocks, p.noise > 0), []).append(i)
    return list(found.values())


def _row(reached: Reached) -> list[Any]:
    return [reached.steps, reached.rate, reached.inside]


def mode_name(mode: tuple[float, float, float]) -> str:
    """Return a mode in words."""
    return f"beta1 {mode[0]:g}, tolerance {mode[2]:g}"


def _all_modes(
    settings: Settings, problems: Sequence[Problem], forms: Sequence[Sharing]
) -> list[tuple[str, str, list[Reached]]]:
    """Return (mode, form, steps of every problem) for problems of one size."""
    stacked = torch.stack([p.matrix for p in problems])
    starts = torch.stack([p.starts for p in problems])
    first, last = settings.rate_exponents
    rates = 2.0 ** (torch.arange(first, last + 1, dtype=torch.float64) / 2)
    budgets = [round(8 * 2 ** (k / 2)) for k in range(settings.budgets + 1)]
    noise = _noise(problems, stacked) if problems[0].noise else None
    return [
        (
            mode_name(mode),
            form.name,
            steps_to(stacked, starts, form, rates, (mode[0], mode[1]), mode[2], budgets, noise),
        )
        for mode in settings.modes
        for form in forms
    ]


def _noise(problems: Sequence[Problem], stacked: Tensor) -> Callable[[Sequence[int]], Callable[[int], Tensor]]:
    """Return the noise of ``steps_to``: positions of problems -> step -> noise [P, d, 1]."""
    values, vectors = torch.linalg.eigh(stacked)
    roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
    scales = torch.tensor([p.noise for p in problems], dtype=torch.float64)

    def chosen(index: Sequence[int]) -> Callable[[int], Tensor]:
        at = torch.tensor(index)
        seeds = [problems[i].seed for i in index]
        return lambda step: noise_at(stacked[at], roots[at], scales[at], seeds, step)

    return chosen


# ------------------------------------------------------------------------------------ matrices and factored moments


def _forms(rows: int, columns: int) -> list[Sharing]:
    """Return the forms of sharing of a matrix whose elements are in row-major order."""
    shape = (rows, columns)
    return [
        Sharing(ELEMENTWISE, rows * columns),
        Sharing("factored", shape=shape),
        Sharing("one scalar per row", rows),
        Sharing("one scalar per column", shape=shape, by_column=True),
        Sharing("one scalar"),
    ]


def matrices(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """Count the steps of every form of sharing on quadratics of a matrix, row-major; one row per problem."""
    side = settings.matrix_side
    generator = torch.Generator().manual_seed(40_000 + seed)
    problems = []
    for condition in (10.0, 100.0):

        def factor(amount: float, c: float = condition) -> Tensor:
            return with_spectrum(log_uniform(side, c, generator), rotation(side, amount, generator))

        rough = 10 ** (2 * math.log10(condition) * (torch.rand(side * side, generator=generator).double() - 1))
        scaled_rows = [float(condition ** (-i / (side - 1))) * factor(10.0) for i in range(side)]
        for kind, matrix in (
            ("Kronecker, both diagonal", torch.kron(factor(0.0), factor(0.0))),
            ("Kronecker, rows diagonal, columns dense", torch.kron(factor(0.0), factor(10.0))),
            ("Kronecker, both dense", torch.kron(factor(10.0), factor(10.0))),
            ("diagonal without structure", torch.diag(rough)),
            ("a dense block per row", torch.block_diag(*scaled_rows)),
        ):
            problems.append(Problem(kind, f"condition {condition:g}", matrix, starts_at(side * side, generator)))
    return _matrix_rows(settings, problems, _forms(side, side))


def real_matrices(settings: Settings, profile: str, seed: int, cache: Path) -> list[dict[str, Any]]:
    """Count the steps on whole weight matrices of a tiny model, as ``matrices`` does, in the deciding mode."""
    rows, deciding = [], dataclasses.replace(settings, modes=settings.modes[:1])  # 256 elements are slow
    for problem, shape in real_blocks.whole_matrices(profile, settings.real_steps, seed, cache):
        rows += _matrix_rows(deciding, [problem], _forms(*shape))
    return rows


def _matrix_rows(settings: Settings, problems: Sequence[Problem], forms: Sequence[Sharing]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": p.kind, "label": p.label, "d": len(p.matrix), "steps": {}} for p in problems]
    for mode, form, found in _all_modes(settings, problems, forms):
        for row, reached in zip(rows, found, strict=True):
            row["steps"].setdefault(mode, {})[form] = _row(reached)
    return rows
