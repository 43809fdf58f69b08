"""The quadratics: the paper's order of methods, r against tau, where one scalar loses, and factored second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from analysis.paper_hessian.store import Results
from analysis.stats import Interval, t_interval

LOSES = math.log2(1.25)
"""A cost above this, log2 of the ratio of steps, counts as a loss."""
BAR, ERROR_BAR = 0.8, 0.2
RESAMPLES = 2000
OUTSIDE = {"size": "blind", "floored": "added later"}
"""Numbers that cannot win, and why."""
ADAMW, ONE = "adamw", "one scalar"
FLOOR = -16.0
"""log10 of f / f(start) below which a method counts as having converged."""
BLOCKWISE, SINGLE = "gradient descent, best rate per block", "gradient descent, one rate"


# ------------------------------------------------------------------------------------------- the three-block quadratic


def ends(results: Results) -> pd.DataFrame:
    """Return one row per seed, problem, schedule and arm: ``end`` (log10 of f, floored), ``inside``, ``curve``."""
    rows = [{"seed": results.seed(name), **row} for name, cell in results.cells.items() for row in cell]
    table = pd.DataFrame(rows)
    table["end"] = table["end"].astype(float).fillna(math.inf).clip(lower=FLOOR)
    return table


def better_adam(table: pd.DataFrame, problem: str, schedule: str, name: str = "Adam", beta1: str = "0") -> str:
    """Return the arm of a method and beta1 whose beta2 has the lower mean end."""
    chosen = table[(table.problem == problem) & (table.schedule == schedule)]
    arms = [arm for arm in chosen.arm.unique() if arm.startswith(f"{name}, betas {beta1},")]
    return str(min(arms, key=lambda arm: chosen[chosen.arm == arm].end.mean()))


def end_difference(table: pd.DataFrame, problem: str, schedule: str, arm: str, other: str) -> Interval:
    """Return the mean over seeds of (end of an arm - end of another), in decades of f."""
    chosen = table[(table.problem == problem) & (table.schedule == schedule)]
    wide = chosen.pivot(index="seed", columns="arm", values="end")
    return t_interval((wide[arm] - wide[other]).tolist())


# ----------------------------------------------------------------------------------------------------- r against tau


def gains(results: Results) -> pd.DataFrame:
    """Return one row per matrix: d, condition, amount, seed, tau, and the log10 of r, r_first and r_mean."""
    rows = []
    for name, cell in results.cells.items():
        d, condition = name.removeprefix("d ").split(", condition ")
        for row in cell:
            for seed, values in enumerate(zip(row["tau"], row["r"], row["r_first"], row["r_mean"], strict=True)):
                rows.append([int(d), float(condition), row["amount"], seed, *values])
    return pd.DataFrame(rows, columns=["d", "condition", "amount", "seed", "tau", "r", "r_first", "r_mean"])


def rank_of_gain(table: pd.DataFrame, column: str, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Return the rank correlation of a column with tau in one pair of d and condition, and its interval over seeds."""
    seeds = table.seed.unique()
    wide_tau = table.pivot(index="seed", columns="amount", values="tau").loc[seeds].to_numpy()
    wide = table.pivot(index="seed", columns="amount", values=column).loc[seeds].to_numpy()
    weights = np.repeat(_drawn(len(seeds), resamples), wide.shape[1], axis=1)
    low, high = np.percentile(spearmans(wide_tau.ravel(), wide.ravel(), weights), (2.5, 97.5))
    return spearman(wide_tau.ravel(), wide.ravel()), float(low), float(high)


def _drawn(clusters: int, resamples: int) -> np.ndarray:
    """Return how often each cluster is in each bootstrap resample, [resamples, clusters]."""
    generator = np.random.default_rng(0)
    index = np.stack([generator.integers(clusters, size=clusters) for _ in range(resamples)])
    counts = np.zeros((resamples, clusters))
    np.add.at(counts, (np.arange(resamples)[:, None], index), 1)
    return counts


def spearmans(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the rank correlation of every resample, [resamples]; 0 where one of the two is constant.

    All resamples at once are much faster than one after the other.

    Args:
        x: [n], entries may be infinite.
        y: [n].
        weights: how often each entry is in a resample, [resamples, n].
    """
    a, b = _weighted_ranks(x, weights), _weighted_ranks(y, weights)
    total = weights.sum(1, keepdims=True)
    a, b = a - (weights * a).sum(1, keepdims=True) / total, b - (weights * b).sum(1, keepdims=True) / total
    products, scales = (weights * a * b).sum(1), np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    out: np.ndarray = np.divide(products, scales, out=np.zeros_like(products), where=scales > 0)
    return out


def _weighted_ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the middle rank of every entry in every resample, [resamples, n]."""
    _, place = np.unique(x, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: np.ndarray = (counts.cumsum(1) - (counts - 1) / 2)[:, place]
    return ranks


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the rank correlation of two vectors, whose entries may be infinite; 0 if one is constant."""
    a, b = scipy.stats.rankdata(x), scipy.stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


# -------------------------------------------------------------------------------------------- where one scalar loses


def with_descent(results: Results, added: Results) -> Results:
    """Add the steps of plain descent, from which ``floored`` is computed, to the problems of ``one_scalar``.

    Raises:
        ValueError: a cell has another number of problems in both parts.
    """
    cells = {}
    for name, cell in results.cells.items():
        steps = added.cells.get(name, [])
        if len(steps) != len(cell):
            raise ValueError(
                f"added_number.json has {len(steps)} problems of the cell {name!r}, one_scalar.json {len(cell)}; run "
                "`python -m experiments.studies.paper_hessian --only added_number` again"
            )
        cells[name] = [{**row, "descent": pairs} for row, pairs in zip(cell, steps, strict=True)]
    return Results(results.settings, cells, results.seconds)


def floor_of(results: Results, mode: str) -> float:
    """Return the mean number of steps that AdamW needs on the fit problems with condition number 1."""
    found = [
        row["steps"][mode][ADAMW][0]
        for name, cell in results.cells.items()
        if name.startswith("fit")
        for row in cell
        if row["numbers"]["kappa"] < 0.01 and row["steps"][mode][ADAMW][0] is not None
    ]
    return float(np.mean(found)) if found else math.nan


def floored(pairs: Sequence[Sequence[float]], floor: float, mode: str) -> float:
    """Return log2((F + c S(H)) / (F + c S(D))) of the worst block; c is 1 - beta1 of the mode.

    Args:
        pairs: steps of plain descent and of descent in Adam's metric, for every block.
        floor: F.
        mode: name of the mode, which begins with its beta1.
    """
    share = 1 - float(mode.split(",")[0].removeprefix("beta1 "))
    return max(math.log2((floor + share * plain) / (floor + share * adam)) for plain, adam in pairs)


def costs(results: Results) -> pd.DataFrame:
    """Return one row per problem and mode.

    Columns: ``set`` ("fit" or "held out"), ``kind``, ``label``, ``seed``, ``d``, ``mode``, ``adamw``, ``one`` (steps,
    infinite if no budget sufficed), ``cost`` (log2 of their ratio; NaN if neither reached the tolerance), ``inside``
    (whether both best rates are inside the grid), and one column per number.
    """
    rows = []
    modes = next(iter(results.cells.values()))[0]["steps"]
    floors = {mode: floor_of(results, mode) for mode in modes}
    for name, cell in results.cells.items():
        for row in cell:
            for mode, steps in row["steps"].items():
                later = {"floored": floored(row["descent"], floors[mode], mode)} if "descent" in row else {}
                adamw, one = (math.inf if steps[arm][0] is None else steps[arm][0] for arm in (ADAMW, ONE))
                rows.append(
                    {
                        "set": "fit" if name.startswith("fit") else "held out",
                        "kind": row["kind"],
                        "label": row["label"],
                        "seed": results.seed(name),
                        "d": row["d"],
                        "mode": mode,
                        "adamw": adamw,
                        "one": one,
                        "cost": _cost(adamw, one),
                        "inside": bool(steps[ADAMW][2] and steps[ONE][2]),
                        **row["numbers"],
                        **later,
                    }
                )
    return pd.DataFrame(rows)


def _cost(adamw: float, one: float) -> float:
    """Return log2(one / adamw); infinite where one of both did not reach the tolerance, NaN where neither did."""
    if math.isinf(adamw):
        return math.nan if math.isinf(one) else -math.inf
    return math.inf if math.isinf(one) else math.log2(one / adamw)


def names(results: Results) -> list[str]:
    """Return the names of the numbers, in the order of the file; the one that was added later is the last."""
    row = next(iter(results.cells.values()))[0]
    return [*row["numbers"], *(["floored"] if "descent" in row else [])]


@dataclass(frozen=True)
class Verdict:
    """How well one number tells where one scalar loses.

    Attributes:
        fit: rank correlation with the cost on the fit problems.
        threshold: the value above which the number says "loses", chosen on the fit problems.
        fit_error: mean of both error rates there.
        held: rank correlation on the held-out problems.
        held_interval: its 95 % bootstrap interval.
        error: mean of both error rates on the held-out problems.
        error_interval: its interval.
        missed: share of the held-out problems with a loss that the threshold misses.
        flagged: share of the other held-out problems that it flags.
    """

    fit: float
    threshold: float
    fit_error: float
    held: float
    held_interval: tuple[float, float]
    error: float
    error_interval: tuple[float, float]
    missed: float
    flagged: float


def rates_of_error(values: np.ndarray, loses: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return (share of losses with a value up to the threshold, share of the others above it); NaN without any."""
    missed = float((values[loses] <= threshold).mean()) if loses.any() else math.nan
    flagged = float((values[~loses] > threshold).mean()) if (~loses).any() else math.nan
    return missed, flagged


def best_threshold(values: np.ndarray, loses: np.ndarray) -> tuple[float, float]:
    """Return the threshold with the smallest mean of both error rates, and that mean.

    Candidates are the middles between neighbouring values; of equally good ones the lowest is taken.
    """
    ordered = np.unique(values)
    candidates = [ordered[0] - 1.0, *(0.5 * (ordered[1:] + ordered[:-1]))]
    errors = [float(np.nanmean(rates_of_error(values, loses, c))) for c in candidates]
    at = int(np.argmin(errors))
    return float(candidates[at]), errors[at]


def verdict(table: pd.DataFrame, number: str, resamples: int = RESAMPLES) -> Verdict:
    """Fit a number's threshold on the fit problems of one mode, and test it on the held-out ones.

    Args:
        table: the rows of one mode.
        number: name of the number.
        resamples: bootstrap resamples; each draws pairs of kind and seed.
    """
    table = table[table.cost.notna()]
    fit, held = table[table["set"] == "fit"], table[table["set"] == "held out"]
    threshold, fit_error = best_threshold(fit[number].to_numpy(), (fit.cost > LOSES).to_numpy())
    values, cost = held[number].to_numpy(), held.cost.to_numpy()
    loses, above = cost > LOSES, values > threshold
    clusters = held.reset_index(drop=True).groupby(["kind", "seed"]).ngroup().to_numpy()
    weights = _drawn(int(clusters.max()) + 1, resamples)[:, clusters]
    ranks = spearmans(values, cost, weights)
    with np.errstate(invalid="ignore"):  # A resample without losses, or without others, has no rate: NaN.
        missing = (weights * (loses & ~above)).sum(1) / (weights * loses).sum(1)
        false = (weights * (~loses & above)).sum(1) / (weights * ~loses).sum(1)
    errors = 0.5 * (missing + false)
    missed, flagged = rates_of_error(values, cost > LOSES, threshold)
    return Verdict(
        fit=spearman(fit[number].to_numpy(), fit.cost.to_numpy()),
        threshold=threshold,
        fit_error=fit_error,
        held=spearman(values, cost),
        held_interval=_ends(ranks),
        error=0.5 * (missed + flagged),
        error_interval=_ends(errors),
        missed=missed,
        flagged=flagged,
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def on_real(table: pd.DataFrame) -> pd.DataFrame:
    """Return the fit problems and those held-out ones that are blocks of trained models."""
    return table[(table["set"] == "fit") | table.kind.str.startswith("real")]


def winner(verdicts: dict[str, Verdict]) -> str:
    """Return the number with the highest rank correlation on the fit problems; those of ``OUTSIDE`` cannot win."""
    return max((name for name in verdicts if name not in OUTSIDE), key=lambda name: verdicts[name].fit)


def tells(found: Verdict) -> bool:
    """Return whether a number passes the page's rule on the held-out problems."""
    return found.held >= BAR and found.error <= ERROR_BAR


# ------------------------------------------------------------------------------------ matrices and factored moments


def matrix_costs(results: Results) -> pd.DataFrame:
    """Return one row per problem, mode and form: kind, label, seed, mode, form, cost (log2 of steps over AdamW's)."""
    rows = []
    for name, cell in results.cells.items():
        for row in cell:
            for mode, steps in row["steps"].items():
                base = steps[ADAMW][0]
                for form, (count, _, inside) in steps.items():
                    if form != ADAMW and base is not None:
                        cost = math.inf if count is None else math.log2(count / base)
                        rows.append([row["kind"], row["label"], results.seed(name), mode, form, cost, bool(inside)])
    return pd.DataFrame(rows, columns=["kind", "label", "seed", "mode", "form", "cost", "inside"])


def standing(costs: Sequence[float]) -> tuple[Interval | None, str]:
    """Return the t-interval of mean costs, and "stands", "loses" or "open"; unreached tolerances lose."""
    values = np.asarray(costs, dtype=float)
    if np.isinf(values).any():
        return None, "loses"
    found = t_interval(values.tolist())
    return found, "stands" if found.high < LOSES else "loses" if found.low > LOSES else "open"
