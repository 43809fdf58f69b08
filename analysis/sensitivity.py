"""How much the final loss depends on hyper-parameters, arm by arm. See docs/protocol.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE
from analysis.settings import Setting
from analysis.stats import Interval, t_interval

VARIED = ("beta1", "beta2", "eps", "weight_decay")
DEFAULTS: Mapping[str, Any] = {"eps": 1e-8}
"""Values of fields that a config leaves out where they have their default."""
GOOD = 0.05
"""Nats above an arm's best loss up to which a learning rate is good."""


def table(settings: Sequence[Setting]) -> pd.DataFrame:
    """Return one row per run: arm, lr, seed, final_val_loss and the hyper-parameters.

    Raises:
        ValueError: no setting has the usual value of every hyper-parameter, or AdamW has no runs.
    """
    parts = []
    for setting in settings:
        values = {name: setting.shared.get(name, DEFAULTS.get(name)) for name in VARIED}
        parts.append(setting.runs[["arm", "lr", "seed", "final_val_loss"]].assign(**values))
    runs = _complete(pd.concat(parts, ignore_index=True))
    if BASELINE not in set(runs.arm):
        raise ValueError(f"no runs of {BASELINE}, with which all others are compared; run `--study sensitivity`")
    usual(runs)
    return runs


def _complete(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the seeds that every arm has at every rate in every setting.

    Raises:
        ValueError: there is no such seed.
    """
    groups = runs.groupby(["arm", "lr", *VARIED])
    seeds = set.intersection(*(set(group.seed) for _, group in groups))
    largest = runs.groupby("arm").apply(
        lambda group: len(group[["lr", *VARIED]].drop_duplicates()), include_groups=False
    )
    if not seeds or largest.nunique() > 1:
        raise ValueError(
            "no seed is complete: arms have different values or rates; run `--study sensitivity` to its end"
        )
    return runs[runs.seed.isin(seeds)].reset_index(drop=True)


def usual(runs: pd.DataFrame) -> dict[str, float]:
    """Return the values of the setting from which all others differ in one hyper-parameter at most.

    Raises:
        ValueError: there is no such setting, or more than one.
    """
    kinds = runs[list(VARIED)].drop_duplicates()
    found = [one for _, one in kinds.iterrows() if ((kinds != one).sum(axis=1) <= 1).all()]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} settings may have the usual values, from which the others differ in one; run `--study "
            "sensitivity` to its end"
        )
    return {name: float(found[0][name]) for name in VARIED}


@dataclass(frozen=True)
class Sensitivity:
    """How much an arm depends on one hyper-parameter.

    Attributes:
        arm: the arm.
        name: the hyper-parameter; ``lr`` for the learning rate at the usual values of the others.
        values: the values that were tried.
        spread: largest minus smallest loss over the values, mean over seeds; None if a value diverged at every rate.
        difference: the same minus AdamW's, paired by seed; None for AdamW.
        worst: the value with the highest mean loss.
    """

    arm: str
    name: str
    values: tuple[float, ...]
    spread: Interval | None
    difference: Interval | None
    worst: float


def sensitivities(runs: pd.DataFrame) -> list[Sensitivity]:
    """Return the sensitivity of every arm to every hyper-parameter.

    Args:
        runs: what ``table`` returned.
    """
    found, at = [], usual(runs)
    for name in ("lr", *VARIED):
        losses = {str(arm): _losses(group, name, at) for arm, group in runs.groupby("arm")}
        base = _spread(losses[BASELINE])
        for arm, wide in losses.items():
            mine = _spread(wide)
            paired = (mine - base).dropna()
            complete = bool(np.isfinite(mine).all()) and len(paired) == len(mine)
            difference = t_interval(paired.tolist()) if arm != BASELINE and complete else None
            spread = t_interval(mine.tolist()) if np.isfinite(mine).all() else None
            worst = float(wide.mean(axis=1).idxmax())
            found.append(Sensitivity(arm, name, tuple(wide.index), spread, difference, worst))
    return found


def _losses(runs: pd.DataFrame, name: str, at: Mapping[str, float]) -> pd.DataFrame:
    """Return value x seed -> loss of one arm, at the best rate of each value; every rate for ``lr``."""
    others = [other for other in VARIED if other != name]
    chosen = runs[np.logical_and.reduce([runs[other] == at[other] for other in others])]
    if name == "lr":
        return chosen.pivot(index="lr", columns="seed", values="final_val_loss")
    rates = chosen.groupby([name, "lr"]).final_val_loss.mean().groupby(name).idxmin()
    best = [rates[value][1] == lr for value, lr in zip(chosen[name], chosen.lr, strict=True)]
    return chosen[best].pivot(index=name, columns="seed", values="final_val_loss")


def _spread(losses: pd.DataFrame) -> pd.Series:
    return losses.max(axis=0) - losses.min(axis=0)


def good_decades(runs: pd.DataFrame, arm: str) -> tuple[float, bool]:
    """Return how many decades of learning rates are good for an arm, by its mean loss at the usual values.

    Returns:
        (decades, whether the good region reaches an end of the grid, so that it may be wider)
    """
    mean = _losses(runs[runs.arm == arm], "lr", usual(runs)).mean(axis=1)
    place, loss = np.log10(mean.index.to_numpy(float)), np.minimum(mean.to_numpy(), 1e3)
    fine = np.linspace(place[0], place[-1], 20_001)
    good = np.interp(fine, place, loss) <= loss.min() + GOOD
    return float(good.mean() * (place[-1] - place[0])), bool(good[0] or good[-1])
