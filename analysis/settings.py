"""Runs of several studies, grouped by setting: what all runs of a comparison share besides arm, rate and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE, best_rates, load_runs
from analysis.runs import config_hash
from analysis.stats import Interval, bootstrap_interval, holm, sign_flip_p

WITHIN = ("arm", "lr", "seed", "rules_hash", "experiment")
"""Fields of a config that may differ between runs of one setting. ``experiment`` only names a folder."""
KEY = ["arm", "lr", "seed"]
"""What tells the runs of one setting apart."""


@dataclass(frozen=True)
class Setting:
    """The runs of one setting.

    Attributes:
        shared: the fields of the config that all its runs share.
        runs: one row per run, as ``load_runs`` gives them, each once.
        disagreement: largest difference between the final losses of runs that two studies have in common, in nats.
            Equal runs on two processors agree to 0.0005 at the best rates, and to 0.02 above them.
    """

    shared: Mapping[str, Any]
    runs: pd.DataFrame
    disagreement: float


def load_settings(*folders: Path, partial: bool = False) -> list[Setting]:
    """Load runs of one or several studies and group them by setting. Of equal runs, that of the first folder counts.

    Args:
        folders: results of studies.
        partial: leave out runs that are neither finished nor diverged; without it they raise an error.

    Raises:
        FileNotFoundError: a folder has no runs.
        ValueError: a run is damaged or unfinished, an arm of a setting has runs of two versions of its rules, or the
            runs of a setting saw different data.
    """
    tables = [load_runs(folder, partial=partial, several=True) for folder in folders]
    table = pd.concat(tables, ignore_index=True)
    table["shared"] = [_frozen({k: v for k, v in config.items() if k not in WITHIN}) for config in table.config]
    settings = []
    for _, group in table.groupby("shared", sort=False):
        config = group.config.iloc[0]
        shared = {key: value for key, value in config.items() if key not in WITHIN}
        runs = group.drop(columns="shared")
        _require_one_version(runs)
        _require_one_data(runs)
        once = runs.drop_duplicates(KEY).sort_values(KEY).reset_index(drop=True)
        settings.append(Setting(shared, once, _disagreement(runs)))
    return settings


def _require_one_version(runs: pd.DataFrame) -> None:
    """Check that all runs of an arm have the same rules, so that no run replaces one of other rules."""
    for arm, group in runs.groupby("arm"):
        first = {config.get("rules_hash"): config for config in reversed(group.config.tolist())}
        if len(first) > 1:
            found = ", ".join(config_hash(config) for config in first.values())
            raise ValueError(f"arm={arm!r} has runs of {len(first)} versions of its rules: {found}; move one away")


def _require_one_data(runs: pd.DataFrame) -> None:
    """Check that all runs of a setting saw the same data, or were judged by the same reward model."""
    known = runs[runs.fingerprint.notna()]
    if known.fingerprint.nunique() > 1:
        first = known.drop_duplicates("fingerprint")
        found = ", ".join(f"{config_hash(run.config)} has {run.fingerprint}" for run in first.itertuples())
        raise ValueError(
            f"runs of one setting have different data (data_fingerprint in status.json): {found}; run them again on "
            "one machine, or move one away"
        )


def _frozen(value: Any) -> Any:
    """Return a hashable copy of a JSON value."""
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(entry)) for key, entry in value.items()))
    return value


def _disagreement(runs: pd.DataFrame) -> float:
    """Return the largest difference between the final losses of equal runs of two studies; infinite if one diverged."""
    spread = [0.0]
    for _, group in runs.groupby(KEY):
        low, high = group.final_val_loss.min(), group.final_val_loss.max()
        spread.append(0.0 if low == high else float(high - low))
    return max(spread)


def differing(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return, for every setting, the fields in which the settings differ; a model's fields as ``model.dim``."""
    flat = [_flat(setting.shared) for setting in settings]
    keys = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if len({repr(one.get(key)) for one in flat}) > 1
    ]
    return [{key: one.get(key) for key in keys} for one in flat]


def _flat(shared: Mapping[str, Any]) -> dict[str, Any]:
    nested = {f"model.{key}": value for key, value in shared.get("model", {}).items()}
    return {**{key: value for key, value in shared.items() if key != "model"}, **nested}


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline within a setting, both at their best learning rates.

    Attributes:
        arm: the arm.
        lr: its best learning rate, by mean final loss over the seeds.
        at_edge: whether that is the first or last rate of its grid, so that a better one may lie outside.
        n: number of paired seeds in which both runs finished.
        diverged: number of its runs at that rate that diverged.
        diverged_anywhere: the same at any of its rates.
        loss: mean final loss over the finished runs at that rate, in nats.
        difference: arm minus baseline, paired by seed, with a 95 % bootstrap interval; None without pairs, or if a run
            of either arm diverged at its best rate, because the mean of the others would leave the divergence out.
        p: p-value of a sign-flip test of the paired differences; NaN where there is no difference.
        p_corrected: the same, corrected for the number of arms by Holm's method.
        scalars: second-moment scalars, or values of state besides the first moment.
    """

    arm: str
    lr: float
    at_edge: bool
    n: int
    diverged: int
    diverged_anywhere: int
    loss: float
    difference: Interval | None
    p: float
    p_corrected: float
    scalars: int


def compare(runs: pd.DataFrame, against: str = BASELINE) -> list[Comparison]:
    """Compare every arm of a setting with the baseline, lowest loss first.

    Args:
        runs: the runs of one setting.
        against: the baseline.

    Raises:
        ValueError: the baseline has no runs.
    """
    if against not in set(runs.arm):
        raise ValueError(f"against={against!r} has no runs here; the arms are {sorted(runs.arm.unique())}")
    rates, found = best_rates(runs), []
    base = _losses(runs, against, rates[against])
    for arm in runs.arm.unique():
        losses, mine = _losses(runs, arm, rates[arm]), runs[runs.arm == arm]
        shared = [seed for seed in losses if seed in base]
        paired = [losses[seed] - base[seed] for seed in shared if np.isfinite(losses[seed]) and np.isfinite(base[seed])]
        complete = bool(paired) and len(paired) == len(shared)
        finite = [value for value in losses.values() if np.isfinite(value)]
        grid = sorted(mine.lr.unique())
        baseline = arm == against
        found.append(
            Comparison(
                arm,
                rates[arm],
                rates[arm] in (grid[0], grid[-1]),
                len(paired),
                sum(not np.isfinite(value) for value in losses.values()),
                int((mine.state == "diverged").sum()),
                float(np.mean(finite)) if finite else float("inf"),
                bootstrap_interval(paired) if complete and not baseline else None,
                sign_flip_p(paired) if complete and not baseline else float("nan"),
                float("nan"),
                int(mine.second_moment_scalars.iloc[0]),
            )
        )
    tested = [i for i, one in enumerate(found) if np.isfinite(one.p)]
    for i, p in zip(tested, holm([found[i].p for i in tested]), strict=True):
        found[i] = dataclasses.replace(found[i], p_corrected=p)
    return sorted(found, key=lambda one: one.loss)


def _losses(runs: pd.DataFrame, arm: str, lr: float) -> dict[int, float]:
    """Return seed -> final loss of an arm at a rate; infinite for a diverged run."""
    chosen = runs[(runs.arm == arm) & (runs.lr == lr)]
    return {int(seed): float(loss) for seed, loss in zip(chosen.seed, chosen.final_val_loss, strict=True)}
