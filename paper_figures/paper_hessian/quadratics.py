"""Figures and tables of the quadratics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.paper_hessian import quadratics
from analysis.paper_hessian.quadratics import BLOCKWISE, FLOOR, LOSES, SINGLE, Verdict
from analysis.paper_hessian.store import Results
from analysis.stats import Interval, t_interval
from paper_figures.style import COLOURS, ROLE_COLOURS, save

NUMBERS = {
    "gain": "gain",
    "adam_gain": "gain, Adam's D",
    "step_ratio": "step ratio",
    "jensen_diagonal": "Jensen gap of diag(H)",
    "jensen_v": "Jensen gap of v",
    "kappa": "kappa",
    "diagonality": "tau",
    "size": "size (blind)",
    "floored": "floored (added later)",
}
CONSTANT = "constant"
VERDICT_HEAD = (
    "number",
    "rank, fit",
    "threshold",
    "error, fit",
    "rank, held out",
    "error, held out",
    "missed",
    "flagged",
)
PROBLEMS = ("three blocks", "block 1 alone", "block 2 alone", "block 3 alone", "one dense block, all eigenvalues")


def interval(found: Interval, digits: int = 2) -> str:
    """Return a mean with its half width."""
    if not math.isfinite(found.half):
        return f"{found.mean:+.{digits}f}"
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# ------------------------------------------------------------------------------------------- the three-block quadratic


def _short(arm: str) -> str:
    return arm.replace("gradient descent", "GD").replace("betas ", "").replace("best rate per block", "rate per block")


def draw_ends(results: Results, out: Path) -> Path:
    """Plot the mean curves of the arms at their best constant rates, and where they end on every problem."""
    found = quadratics.ends(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.6), width_ratios=(1, 1.15))
    arms = list(dict.fromkeys(found.arm))
    colours = dict(zip(arms, (COLOURS[6], COLOURS[2], *COLOURS[:2], *COLOURS[3:6], "#8B4513"), strict=False))
    three = found[(found.problem == PROBLEMS[0]) & (found.schedule == CONSTANT)]
    for arm in arms:
        curves = np.array(three[three.arm == arm].curve.tolist(), dtype=float)
        steps = np.linspace(0, results.settings["steps"], curves.shape[1])
        left.plot(steps, curves.mean(0), color=colours[arm], ls="--" if "mini" in arm else "-", label=_short(arm))
    left.set_ylim(FLOOR - 0.5, 0.8)
    left.set_xlabel("step")
    left.set_ylabel("log10 f / f(start), mean over seeds")
    left.set_title(f"three blocks, constant rates, n = {found.seed.nunique()} seeds")
    left.legend()
    for j, arm in enumerate(arms):
        for i, problem in enumerate(PROBLEMS):
            values = found[(found.problem == problem) & (found.schedule == CONSTANT) & (found.arm == arm)].end
            if len(values) and np.isfinite(values).all():
                end = t_interval(values.tolist())
                right.errorbar(
                    end.mean, i + (j - len(arms) / 2) * 0.09, xerr=end.half, fmt="o", ms=4, color=colours[arm],
                    mfc="white" if "mini" in arm else colours[arm], capsize=2,
                )  # fmt: skip
    right.set_yticks(range(len(PROBLEMS)), [p.replace(", ", ",\n") for p in PROBLEMS])
    right.invert_yaxis()
    right.set_xlabel("log10 f / f(start) after the last step, mean and 95 % interval (-16: converged)")
    right.set_title("every problem, constant rates (hollow and dashed: Adam-mini)")
    return save(figure, out, "hessian_three_blocks")


def ends_tables(results: Results) -> str:
    """Return the ends of all arms, and the differences that decide."""
    found = quadratics.ends(results)
    rows = []
    for problem in PROBLEMS:
        for arm in dict.fromkeys(found[found.problem == problem].arm):
            row = [problem, arm]
            for schedule in dict.fromkeys(found.schedule):
                chosen = found[(found.problem == problem) & (found.arm == arm) & (found.schedule == schedule)]
                edge = int((~chosen.inside).sum())
                text = interval(t_interval(chosen.end.tolist())) if np.isfinite(chosen.end).all() else "diverged"
                row.append(text + (f" ({edge} at the edge)" if edge else ""))
            rows.append(row)
    parts = [
        "log10 of f at the end over f at the start, mean over seeds ± 95 % t-interval, at the best of 37 rates "
        "(-16: converged):",
        table(["problem", "arm", *(f"rate {s}" for s in dict.fromkeys(found.schedule))], rows),
        "Differences that decide (decades of f, paired by seed; below zero: the first ends lower):",
        table(["problem", "difference", "constant", "linear to zero"], _end_differences(found)),
    ]
    return "\n\n".join(parts)


def _end_differences(found: pd.DataFrame) -> list[list[str]]:
    rows = []
    for problem in PROBLEMS:
        pairs = [("blockwise", "Adam"), ("Adam", "one rate")] if problem == PROBLEMS[0] else [("one rate", "Adam")]
        for pair in [*pairs, ("Adam-mini", "Adam")]:
            row = [problem, f"{pair[0]} minus {pair[1]}"]
            for schedule in dict.fromkeys(found.schedule):
                arms = {
                    "blockwise": BLOCKWISE,
                    "one rate": SINGLE,
                    "Adam": quadratics.better_adam(found, problem, schedule),
                    "Adam-mini": quadratics.better_adam(found, problem, schedule, "Adam-mini"),
                }
                row.append(interval(quadratics.end_difference(found, problem, schedule, arms[pair[0]], arms[pair[1]])))
            rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------- r against tau


def draw_gains(results: Results, out: Path) -> Path:
    """Plot log10 r against tau: one panel per condition number, one colour per dimension, for both diagonals."""
    found = quadratics.gains(results)
    conditions = sorted(found.condition.unique())
    figure, grid = plt.subplots(1, len(conditions), figsize=(3.5 * len(conditions), 3.9), sharey=True, squeeze=False)
    for axes, condition in zip(grid[0], conditions, strict=True):
        for colour, (d, rows) in zip(COLOURS, found[found.condition == condition].groupby("d"), strict=False):
            axes.plot(rows.tau, rows.r, ".", color=colour, ms=2.5, alpha=0.35)
            means = rows.groupby("amount")[["tau", "r", "r_first"]].mean().sort_values("tau")
            axes.plot(means.tau, means.r, color=colour, lw=1.6, label=f"d = {d}, D = diag(H)")
            axes.plot(means.tau, means.r_first, color=colour, lw=1.1, ls=":", label=f"d = {d}, |first gradient|")
        axes.axhline(0, color=COLOURS[6], lw=0.8)
        axes.set_title(f"condition number {condition:g}")
        axes.set_xlabel("tau: share of the diagonal in |H|")
    grid[0][0].set_ylabel("log10 r (below 0: the diagonal helps)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return save(figure, out, "hessian_r_tau")


def gains_tables(results: Results) -> str:
    """Return rank correlations of r with tau, and r of diagonal and of fully mixed matrices."""
    found = quadratics.gains(results)
    last = found.amount.max()
    rows = []
    for (d, condition), cell in found.groupby(["d", "condition"]):
        row = [str(d), f"{condition:g}"]
        for column in ("r", "r_first", "r_mean"):
            rank, low, high = quadratics.rank_of_gain(cell, column)
            row.append(f"{rank:.2f} [{low:.2f}, {high:.2f}]")
        dense, diagonal = cell[cell.amount == last], cell[cell.amount == 0]
        row.append(interval(t_interval(diagonal.r.tolist())))
        row += [interval(t_interval(dense[column].tolist())) for column in ("r", "r_first")]
        row.append(f"{(dense.r > 0).mean():.0%}, {(dense.r_first > 0).mean():.0%}")
        rows.append(row)
    head = ["d", "kappa", "rank: D = diag(H)", "rank: first gradient", "rank: mean square"]
    head += ["log10 r, diagonal H", "log10 r, dense H", "the same, first gradient", "dense H with r > 1"]
    n = found.seed.nunique()
    return f"Rank correlation of r with tau (95 % bootstrap over {n} seeds), and r at both ends:\n\n{table(head, rows)}"


# -------------------------------------------------------------------------------------------- where one scalar loses


def _verdicts(found: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, Verdict]]:
    """Return mode -> number -> verdict."""
    return {
        mode: {name: quadratics.verdict(rows, name) for name in names}
        for mode, rows in found.groupby("mode", sort=False)
    }


def draw_costs(results: Results, out: Path) -> Path:
    """Plot the cost against the winning number, fitted and held out, and how well every number ranks and tells."""
    found, names = quadratics.costs(results), quadratics.names(results)
    modes = list(dict.fromkeys(found["mode"]))
    figure, grid = plt.subplots(
        len(modes), 3, figsize=(13.5, 3.9 * len(modes) + 0.7), width_ratios=(1, 1.1, 0.9), squeeze=False
    )
    for axes, mode in zip(grid, modes, strict=True):
        rows = found[(found["mode"] == mode) & found.cost.notna()]
        verdicts = {name: quadratics.verdict(rows, name) for name in names}
        best = quadratics.winner(verdicts)
        for ax, which in zip(axes, ("fit", "held out"), strict=False):
            _cost_panel(ax, rows, which, best, verdicts[best])
        axes[0].set_ylabel("log2 (steps with one scalar / AdamW's)")
        axes[0].set_title(f"{mode}; {axes[0].get_title()}")
        _bars(axes[2], verdicts)
    handles = {}
    for ax in grid.ravel():
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7)
    return save(figure, out, "hessian_one_scalar")


def _cost_panel(axes: Axes, rows: pd.DataFrame, which: str, number: str, found: Verdict) -> None:
    """Plot the fit or the held-out problems of one mode; costs that are infinite are at the upper and lower edge."""
    kinds = list(dict.fromkeys(rows.kind))
    finite = rows.cost[np.isfinite(rows.cost)]
    chosen = rows[rows["set"] == which]
    for colour, marker, kind in zip((*ROLE_COLOURS, "#B8B000", "#555555"), "os^vDPX*<>d", kinds, strict=False):
        group = chosen[chosen.kind == kind]
        if len(group):
            cost = group.cost.clip(finite.min() - 0.4, finite.max() + 0.4)
            axes.plot(group[number], cost, marker, color=colour, ms=4.5, mfc="none", label=kind)
    axes.axhline(LOSES, color=COLOURS[6], lw=0.8, ls="--")
    axes.axvline(found.threshold, color=COLOURS[6], lw=0.8, ls="--")
    axes.set_xlabel(f"{NUMBERS.get(number, number)} (dashed: threshold; a loss is above the line)")
    rank = found.fit if which == "fit" else found.held
    axes.set_title(f"{which}, n = {len(chosen)}: rank correlation {rank:.2f}")


def _bars(axes: Axes, verdicts: dict[str, Verdict]) -> None:
    """Plot every number's rank correlation and mean error on the held-out problems."""
    for i, found in enumerate(verdicts.values()):
        for value, ends, colour, offset, label in (
            (found.held, found.held_interval, COLOURS[0], -0.15, "rank correlation, held out"),
            (found.error, found.error_interval, COLOURS[1], 0.15, "mean of both error rates, held out"),
        ):
            error = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
            axes.errorbar(value, i + offset, xerr=error, fmt="o", color=colour, ms=4, capsize=2, label=label)
    axes.axvline(quadratics.BAR, color=COLOURS[0], ls="--", lw=1)
    axes.axvline(quadratics.ERROR_BAR, color=COLOURS[1], ls="--", lw=1)
    axes.set_yticks(range(len(verdicts)), [NUMBERS.get(name, name) for name in verdicts])
    axes.invert_yaxis()
    axes.set_title("held-out problems, all numbers (dashed: the bars)")


def costs_tables(results: Results) -> str:
    """Return the verdict on every number for every mode, and the cost of every kind of problem."""
    found, names = quadratics.costs(results), quadratics.names(results)
    parts = []
    for mode, verdicts in _verdicts(found, names).items():
        best = quadratics.winner(verdicts)
        rows = [_verdict_row(name, v, name == best) for name, v in verdicts.items()]
        chosen = found[found["mode"] == mode]
        skipped, edge = int(chosen.cost.isna().sum()), int((~chosen.inside).sum())
        parts += [
            f"**{mode}**: {len(chosen)} problems; neither reaches the tolerance in {skipped}, which are left out; a "
            f"best rate at the edge of the grid in {edge}. The winner `{best}` "
            + ("tells." if quadratics.tells(verdicts[best]) else "does not tell."),
            table(VERDICT_HEAD, rows),
        ]
        real = quadratics.on_real(chosen)
        if (real["set"] != "fit").any():
            alone = {name: quadratics.verdict(real, name) for name in names}
            parts += [
                "The same with the real blocks alone as held-out problems:",
                table(VERDICT_HEAD, [_verdict_row(name, v, False) for name, v in alone.items()]),
            ]
    parts += [
        "Cost by kind: the ratio of steps (geometric mean, 95 % t-interval over seeds), and the share of problems in "
        "which one scalar loses:",
        _kinds(found),
    ]
    return "\n\n".join(parts)


def _verdict_row(name: str, found: Verdict, wins: bool) -> list[str]:
    held = f"{found.held:.2f} [{found.held_interval[0]:.2f}, {found.held_interval[1]:.2f}]"
    error = f"{found.error:.2f} [{found.error_interval[0]:.2f}, {found.error_interval[1]:.2f}]"
    outside = f" ({quadratics.OUTSIDE[name]})" if name in quadratics.OUTSIDE else ""
    label = f"**`{name}`** (winner)" if wins else f"`{name}`{outside}"
    shares = [f"{found.missed:.2f}", f"{found.flagged:.2f}"]
    return [label, f"{found.fit:.2f}", f"{found.threshold:.3g}", f"{found.fit_error:.2f}", held, error, *shares]


def ratio(found: Interval) -> str:
    """Return a mean of log2 ratios as a ratio with the ends of its interval, which a single value lacks."""
    if not math.isfinite(found.half):
        return f"{2**found.mean:.2f}"
    return f"{2**found.mean:.2f} [{2**found.low:.2f}, {2**found.high:.2f}]"


def _kinds(found: pd.DataFrame) -> str:
    modes = list(dict.fromkeys(found["mode"]))
    rows = []
    for kind, group in found.groupby("kind", sort=False):
        row = [str(kind), str(len(group) // len(modes))]
        for mode in modes:
            chosen = group[(group["mode"] == mode) & np.isfinite(group.cost)]
            per_seed = chosen.groupby("seed").cost.mean().tolist()
            row.append(f"{ratio(t_interval(per_seed))}, {(chosen.cost > LOSES).mean():.0%}" if per_seed else "–")
        rows.append(row)
    return table(["kind", "n", *modes], rows)


# ------------------------------------------------------------------------------------ matrices and factored moments


def _matrix_cells(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return name -> rows: every kind and condition alone, and the matrices of the tiny models together."""
    cells = {}
    for (kind, label), rows in found.groupby(["kind", "label"], sort=False):
        if not str(kind).startswith("real"):
            cells[f"{kind}, {label}"] = rows
    real = found[found.kind.str.startswith("real")]
    return cells | ({"queries, values and outputs of trained GPTs": real} if len(real) else {})


def draw_matrices(results: Results, out: Path) -> Path:
    """Plot the cost of every form of sharing in every kind of matrix, in the deciding mode."""
    found = quadratics.matrix_costs(results)
    mode, forms = found["mode"].iloc[0], list(dict.fromkeys(found.form))
    cells = _matrix_cells(found[found["mode"] == mode])
    figure, axes = plt.subplots(figsize=(8.6, 0.42 * len(cells) + 1.6))
    for j, form in enumerate(forms):
        for i, rows in enumerate(cells.values()):
            costs = rows[rows.form == form].cost
            found_interval, _ = quadratics.standing(costs.tolist())
            y = i + (j - (len(forms) - 1) / 2) * 0.17
            if found_interval is not None:
                axes.errorbar(
                    found_interval.mean, y, xerr=found_interval.half, fmt="o", ms=4, capsize=2, color=COLOURS[j]
                )
    for j, form in enumerate(forms):
        axes.plot([], [], "o", color=COLOURS[j], label=form)
    axes.axvline(0, color=COLOURS[6], lw=0.8)
    axes.axvline(LOSES, color=COLOURS[6], lw=0.8, ls="--")
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_xlabel("log2 (steps / AdamW's), mean and 95 % interval (dashed: loses)")
    axes.set_title(mode)
    figure.legend(loc="outside lower center", ncols=4)
    return save(figure, out, "hessian_matrices")


def matrix_tables(results: Results) -> str:
    """Return the ratio of steps of every form and whether it stands, for every mode."""
    found = quadratics.matrix_costs(results)
    forms, parts = list(dict.fromkeys(found.form)), []
    for mode, chosen in found.groupby("mode", sort=False):
        rows = []
        for name, cell in _matrix_cells(chosen).items():
            row = [name, str(len(cell) // len(forms))]
            for form in forms:
                found_interval, word = quadratics.standing(cell[cell.form == form].cost.tolist())
                row.append(f"{ratio(found_interval)} {word}" if found_interval else f"not reached: {word}")
            rows.append(row)
        edge = int((~chosen.inside).sum())
        parts += [
            f"**{mode}**: steps over AdamW's (geometric mean, 95 % t-interval over problems). {edge} best rates of "
            f"{len(chosen)} are at the edge.",
            table(["matrix", "n", *forms], rows),
        ]
    return "\n\n".join(parts)
