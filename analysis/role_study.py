"""Statistics of the role study: which criterion ranks the measured cost of sharing? See docs/role_study.md."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from analysis.documents import damaged, is_finite, read_object
from analysis.stats import Interval, t_interval

ADAMW, TWIN = "adamw", "twin"
FIT, HELD_OUT = ("llama", "python-stdlib"), ("gpt", "enwik8")
MIXED = (("llama", "enwik8"), ("gpt", "python-stdlib"))
OUTSIDE = {"scalars": "blind", "size": "blind", "probe": "added later"}
"""Criteria that cannot win, and why: they know nothing of second moments, or were added after the outcome."""
BAR = 0.8
RESAMPLES = 2000
_MEND = "run `python -m experiments.studies.role_study` again"
_ROWS = {"VALUE": "OUT_NEURON", "ATTENTION_OUT": "OUT_NEURON", "MLP_IN": "OUT_NEURON", "MLP_OUT": "OUT_NEURON"}
_SHARED = {"TOKEN_EMBEDDING": "TOKEN", "POSITION_EMBEDDING": "TOKEN", "HEAD": "TOKEN", "NORM": "TENSOR"}
_COLUMNS = {"QUERY": "IN_NEURON", "VALUE": "IN_NEURON", "ATTENTION_OUT": "IN_NEURON", "MLP_OUT": "IN_NEURON"}
_MATRICES = ("POSITION_EMBEDDING", "QUERY", "KEY", "VALUE", "ATTENTION_OUT", "MLP_IN", "MLP_OUT")
WHOLE_SETS: dict[str, dict[str, str]] = {
    "adam_mini": {**_SHARED, **_ROWS, "QUERY": "ATTENTION_HEAD", "KEY": "ATTENTION_HEAD"},
    "derived_blocks": {**_SHARED, **_COLUMNS, "KEY": "OUT_NEURON", "MLP_IN": "OUT_NEURON"},
    "factored": {**_SHARED, **dict.fromkeys(_MATRICES, "FACTORED")},
}
WHOLE_SETS["derived_row"] = {**WHOLE_SETS["derived_blocks"], "QUERY": "OUT_NEURON"}
WHOLE_SETS["all_factored"] = {**WHOLE_SETS["factored"], "TOKEN_EMBEDDING": "FACTORED", "HEAD": "FACTORED"}
"""The unit of every studied role in the rule sets that were trained as a whole; the last two were added later."""


@dataclass(frozen=True)
class Study:
    """The results of the study.

    Attributes:
        gaps: one row per run of a complete seed: model, data, lr, seed, arm, and gap, the final loss minus AdamW's with
            the same seed, infinite if the run diverged.
        criteria: the same index and one column per criterion, for arms that change one role; empty before they exist.
        runs: number of finished runs, AdamW's and those of incomplete seeds included.
    """

    gaps: pd.DataFrame
    criteria: pd.DataFrame
    runs: int


def load(folder: Path) -> Study:
    """Read the results of the study. Seeds of a cell that lack an arm are left out.

    Raises:
        FileNotFoundError: the folder has no results.
        ValueError: a file is damaged, or AdamW diverged.
    """
    documents = {path: read_object(path, _MEND) for path in sorted(folder.glob("*.json")) if path.stem != "criteria"}
    if not documents:
        raise FileNotFoundError(f"no results in {folder}; run `python -m experiments.studies.role_study` first")
    arms: dict[str, set[str]] = {}
    for path, document in documents.items():
        for key in ("cell", "runs"):
            if not isinstance(document.get(key), dict):
                raise damaged(path, f"it has no {key}", _MEND)
        arms.setdefault(document["cell"].get("model"), set()).update(document["runs"])
    rows: list[dict[str, Any]] = []
    for path, document in documents.items():
        cell, runs = document["cell"], document["runs"]
        if set(runs) == arms[cell["model"]]:
            rows += _gaps(path, cell, runs)
    gaps = pd.DataFrame(rows, columns=["name", "model", "data", "lr", "seed", "arm", "gap"])
    return Study(gaps, _criteria(folder / "criteria.json", gaps), sum(len(d["runs"]) for d in documents.values()))


def _gaps(path: Path, cell: Mapping[str, Any], runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one complete seed of a cell."""
    losses = {}
    for arm, run in runs.items():
        loss = run.get("final_val_loss") if isinstance(run, dict) else None
        if loss is not None and not is_finite(loss):
            raise damaged(path, f"arm {arm!r} has final_val_loss={loss!r}", _MEND)
        losses[arm] = float("inf") if loss is None else float(loss)
    base = losses.get(ADAMW, float("inf"))
    if base == float("inf"):
        raise ValueError(f"{path}: {ADAMW} diverged or is missing, so nothing can be compared with it; {_MEND}")
    return [{"name": path.stem, **cell, "arm": arm, "gap": loss - base} for arm, loss in losses.items()]


def _criteria(path: Path, gaps: pd.DataFrame) -> pd.DataFrame:
    """Return the criteria of the cells in ``gaps``, indexed as there."""
    if not path.is_file():
        return pd.DataFrame()
    document = read_object(path, "run `python -m experiments.studies.role_study --criteria` again")
    table = pd.DataFrame(document["rows"], columns=document["columns"]).rename(columns={"cell": "name"})
    cells = gaps[["name", "model", "data", "lr", "seed"]].drop_duplicates()
    return cells.merge(table, on="name").drop(columns="name")


def names(study: Study) -> list[str]:
    """Return the names of the criteria, in the order of the file."""
    return [column for column in study.criteria.columns if column not in ("model", "data", "lr", "seed", "arm")]


@dataclass(frozen=True)
class Block:
    """Measurements of one model, corpus and learning rate.

    Attributes:
        arms: names of the arms that change one role, [arms].
        roles: the role of every arm, [arms].
        seeds: the seeds that are complete, [seeds].
        gap: [seeds, arms], in nats.
        criteria: [seeds, arms, criteria].
    """

    arms: list[str]
    roles: np.ndarray
    seeds: list[int]
    gap: np.ndarray
    criteria: np.ndarray


def blocks(study: Study, model: str, data: str) -> dict[float, Block]:
    """Return the measurements of a model and a corpus by learning rate; empty if no seed is complete."""
    out = {}
    columns = names(study)
    chosen = study.gaps[(study.gaps.model == model) & (study.gaps.data == data)]
    for lr, cell in chosen[chosen.arm.str.contains("/")].groupby("lr"):
        table = cell.merge(study.criteria, on=["model", "data", "lr", "seed", "arm"], how="left")
        if table[columns].isna().any(axis=None):
            raise ValueError(
                f"criteria.json lacks arms of {model}, {data}, lr {lr}; run "
                "`python -m experiments.studies.role_study --criteria`"
            )
        seeds, arms = sorted(table.seed.unique()), list(dict.fromkeys(table.arm))
        table = table.set_index(["seed", "arm"]).loc[list(itertools.product(seeds, arms))]
        shape = (len(seeds), len(arms))
        out[float(lr)] = Block(
            arms,
            np.array([arm.split("/")[0] for arm in arms]),
            seeds,
            table.gap.to_numpy().reshape(shape),
            table[columns].to_numpy().reshape(*shape, len(columns)),
        )
    return out


def without(block: Block, role: str) -> Block:
    """Return a cell without the arms of one role."""
    kept = np.flatnonzero(block.roles != role)
    arms = [block.arms[i] for i in kept]
    return Block(arms, block.roles[kept], block.seeds, block.gap[:, kept], block.criteria[:, kept])


def spearman(criteria: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return the rank correlation of every criterion with the gap; 0 for a criterion that is constant.

    Args:
        criteria: [arms, criteria].
        gap: [arms]; infinite values rank last.
    """
    ranks = scipy.stats.rankdata(np.column_stack([criteria, gap]), axis=0)
    ranks = ranks - ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    products = ranks[:, :-1].T @ ranks[:, -1]
    return np.divide(products, norms[:-1] * norms[-1], out=np.zeros_like(products), where=norms[:-1] * norms[-1] > 0)


def slopes(criteria: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return the least-squares slope of the gap on every criterion, with an intercept; infinite gaps are left out.

    Args:
        criteria: [arms, criteria].
        gap: [arms].
    """
    finite = np.isfinite(gap)
    x, y = criteria[finite] - criteria[finite].mean(0), gap[finite] - gap[finite].mean()
    squares = (x**2).sum(0)
    return np.divide(x.T @ y, squares, out=np.zeros(x.shape[1]), where=squares > 0)


def pooled(cells: Sequence[Block], seeds: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (criteria [arms, criteria], gap [arms]): means over seeds, with the arms of all cells in one list.

    Args:
        cells: the cells.
        seeds: positions of the seeds to average, possibly repeated; None for all.
    """
    picks = [list(range(len(c.seeds))) if seeds is None else [s % len(c.seeds) for s in seeds] for c in cells]
    criteria = np.concatenate([c.criteria[p].mean(0) for c, p in zip(cells, picks, strict=True)])
    return criteria, np.concatenate([c.gap[p].mean(0) for c, p in zip(cells, picks, strict=True)])


@dataclass(frozen=True)
class Correlations:
    """Rank correlations and slopes of all criteria, with 95 % bootstrap intervals over seeds and roles.

    Attributes:
        rank: Spearman correlations, [criteria].
        rank_interval: their lower and upper ends, [2, criteria].
        slope: nats per unit of the criterion, [criteria].
        slope_interval: their lower and upper ends, [2, criteria].
        n: number of points.
    """

    rank: np.ndarray
    rank_interval: np.ndarray
    slope: np.ndarray
    slope_interval: np.ndarray
    n: int


def correlations(cells: Sequence[Block], resamples: int = RESAMPLES, seed: int = 0) -> Correlations:
    """Correlate every criterion with the mean gap over the arms of some cells together.

    Args:
        cells: the cells; they must have the same roles.
        resamples: number of bootstrap resamples; each draws seeds and roles, and a role brings all its arms.
        seed: seed of the resamples.
    """
    criteria, gap = pooled(cells)
    roles = np.concatenate([c.roles for c in cells])
    members = [np.flatnonzero(roles == role) for role in dict.fromkeys(roles)]
    generator = np.random.default_rng(seed)
    ranks, lines = [], []
    for _ in range(resamples):
        seeds = generator.integers(len(cells[0].seeds), size=len(cells[0].seeds)).tolist()
        index = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        x, y = pooled(cells, seeds)
        ranks.append(spearman(x[index], y[index]))
        lines.append(slopes(x[index], y[index]))
    ends = (2.5, 97.5)
    return Correlations(
        spearman(criteria, gap),
        np.percentile(ranks, ends, axis=0),
        slopes(criteria, gap),
        np.percentile(lines, ends, axis=0),
        len(gap),
    )


def winner(study: Study) -> tuple[str, dict[str, float]]:
    """Return the criterion with the highest mean rank correlation over the fit cells, and that mean of every criterion.

    Raises:
        ValueError: no fit cell is complete.
    """
    cells = list(blocks(study, *FIT).values())
    if not cells:
        raise ValueError(f"no seed of {FIT} is complete; run `python -m experiments.studies.role_study`")
    means = np.mean([spearman(*pooled([cell])) for cell in cells], axis=0)
    scores = {name: float(score) for name, score in zip(names(study), means, strict=True)}
    return max((name for name in scores if name not in OUTSIDE), key=lambda name: scores[name]), scores


def ceiling(cells: Sequence[Block]) -> float:
    """Return the rank correlation of one seed's gaps with the mean gaps of the other seeds, averaged over seeds.

    It is NaN with a single seed.
    """
    count = len(cells[0].seeds)
    scores = []
    for seed in range(count if count > 1 else 0):
        others = [i for i in range(count) if i != seed]
        one, rest = pooled(cells, [seed])[1], pooled(cells, others)[1]
        scores.append(float(spearman(one[:, None], rest)[0]))
    return float(np.mean(scores)) if scores else float("nan")


def regrets(cells: Sequence[Block], factored: bool = True) -> tuple[np.ndarray, dict[str, float]]:
    """Return the mean regret of every criterion, [criteria], and of the units of ``WHOLE_SETS``, in nats.

    The regret of a choice is the mean gap over seeds of the chosen unit minus the lowest one of the role, averaged over
    the roles with a choice and over cells. A criterion chooses the unit with its lowest value.

    Args:
        cells: the cells.
        factored: whether FACTORED may be chosen and counts as the lowest; without it, rule sets with this
            unit are left out.
    """
    sets = {name: units for name, units in WHOLE_SETS.items() if factored or "FACTORED" not in units.values()}
    of_criteria, of_sets = [], {name: [] for name in sets}
    for cell in cells:
        gap, criteria = cell.gap.mean(0), cell.criteria.mean(0)
        for role in dict.fromkeys(cell.roles):
            arms = [i for i, r in enumerate(cell.roles) if r == role and (factored or "FACTORED" not in cell.arms[i])]
            if len(arms) > 1:
                lowest = gap[arms].min()
                of_criteria.append([gap[arms[i]] - lowest for i in criteria[arms].argmin(0)])
                for name, units in sets.items():
                    of_sets[name].append(gap[cell.arms.index(f"{role}/{units[role]}")] - lowest)
    return np.mean(of_criteria, axis=0), {name: float(np.mean(values)) for name, values in of_sets.items()}


def additivity(study: Study) -> pd.DataFrame:
    """Return, for every cell and whole rule set, the sum of single-role gaps, the gap of the set, and their difference.

    Every number is an ``Interval`` over seeds; the difference is the set's gap minus the sum, within a seed.
    """
    rows = []
    for (model, data, lr), cell in study.gaps.groupby(["model", "data", "lr"]):
        wide = cell.pivot(index="seed", columns="arm", values="gap")
        for name, units in WHOLE_SETS.items():
            parts = [f"{role}/{unit}" for role, unit in units.items() if f"{role}/{unit}" in wide]
            total, whole = wide[parts].sum(axis=1), wide[name]
            if np.isfinite(total).all() and np.isfinite(whole).all():
                three = (t_interval(x.tolist()) for x in (total, whole, whole - total))
                rows.append([model, data, lr, name, *three])
    return pd.DataFrame(rows, columns=["model", "data", "lr", "rules", "sum", "whole", "difference"])


def difference(study: Study, arm: str, other: str, *, mixed: bool = False, lr: float | None = None) -> Interval:
    """Return an arm's loss minus another's, averaged over cells within each seed: an interval over seeds.

    Args:
        study: the study.
        arm: an arm.
        other: another one.
        mixed: only the mixed pairs of model and corpus.
        lr: only this learning rate.

    Raises:
        ValueError: no cell is left, or an arm is unknown.
    """
    gaps = study.gaps
    chosen = gaps[[not mixed or pair in MIXED for pair in zip(gaps.model, gaps.data, strict=True)]]
    chosen = chosen if lr is None else chosen[chosen.lr == lr]
    wide = chosen.pivot(index=["seed", "model", "data", "lr"], columns="arm", values="gap")
    if missing := {arm, other} - set(wide.columns):
        raise ValueError(f"no runs of {sorted(missing)} with mixed={mixed}, lr={lr}; the arms are {list(wide.columns)}")
    return t_interval((wide[arm] - wide[other]).groupby("seed").mean().tolist())


def noise(study: Study) -> dict[tuple[str, str, float], Interval]:
    """Return the gaps of the twin, AdamW from slightly different weights, by model, corpus and learning rate."""
    twins = study.gaps[study.gaps.arm == TWIN]
    return {key: t_interval(cell.gap.tolist()) for key, cell in twins.groupby(["model", "data", "lr"])}
