"""Any folder of training runs as a study: which fields its configs vary in, tables, Pareto fronts and curves.

A study varies arm, learning rate and seed. Whatever else varies within an arm (warm-up, clipping, sizes, lengths)
divides its runs into *conditions*; arms are compared within a condition only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE, at_best, best_rates, load_runs
from analysis.runs import config_hash
from analysis.stats import Interval, t_interval

BASELINES = (BASELINE, "torch_adamw")
"""Arms that are AdamW, in the order of preference."""
_COMMON = ("arm", "lr", "seed", "rules_hash", "experiment", "checkpoint_every")
"""Fields that never divide runs into conditions."""


@dataclass(frozen=True)
class Study:
    """The runs of one folder.

    Attributes:
        name: name of the folder.
        runs: one row per run; the columns of ``read_run`` without ``config``, ``hash``, and ``condition`` in words.
        varied: field -> its values, for the fields that make up a condition; empty if there is one condition.
        shared: field -> value, for the fields that all runs share.
        left_out: number of runs that are neither finished nor diverged, by state.
    """

    name: str
    runs: pd.DataFrame
    varied: Mapping[str, list[Any]]
    shared: Mapping[str, Any]
    left_out: Mapping[str, int]

    @property
    def conditions(self) -> list[str]:
        """The conditions, sorted by the values of their fields; one empty text if nothing varies."""
        return list(dict.fromkeys(self.runs.sort_values("place").condition))

    @property
    def baseline(self) -> str | None:
        """The arm that differences are taken from; None if no arm is AdamW."""
        arms = set(self.runs.arm)
        return next((arm for arm in BASELINES if arm in arms), None)

    def of(self, condition: str) -> pd.DataFrame:
        """Return the runs of one condition."""
        return self.runs[self.runs.condition == condition].reset_index(drop=True)


def folders(root: Path) -> tuple[list[Path], list[Path]]:
    """Find the studies under a results root.

    Returns:
        (folders with training runs, folders without any)

    Raises:
        FileNotFoundError: the root does not exist, or no folder has training runs.
    """
    found: list[Path] = []
    others: list[Path] = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith(".")):
        has_runs = any((run / "config.json").is_file() for run in folder.glob("*"))
        (found if has_runs else others).append(folder)
    if not found:
        raise FileNotFoundError(f"no training runs under {root}; give another --results, or run `make ablation`")
    return found, others


def load(folder: Path) -> Study:
    """Read a study. Runs that are neither finished nor diverged are counted and left out.

    Raises:
        FileNotFoundError: the folder has no results.
        ValueError: a subfolder is no run or is damaged, or two runs have the same arm, rate, seed and condition.
    """
    for run in sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")):
        if not (run / "config.json").is_file():
            raise ValueError(f"{run} is no training run: it has no config.json; move it out of {folder}")
    table = load_runs(folder, partial=True, several=True)
    configs = [_flat(config) for config in table.config]
    varied, shared = _varied(configs, table.arm.tolist())
    table["hash"] = [config_hash(config) for config in table.config]
    table["condition"] = [_in_words({key: config.get(key) for key in varied}) for config in configs]
    table["place"] = [tuple(varied[key].index(config.get(key)) for key in varied) for config in configs]
    keys = ["arm", "lr", "seed", "condition"]
    twice = table[table.duplicated(keys, keep=False)]
    if len(twice):
        names = ", ".join(config_hash(config) for config in twice.config[:2])
        raise ValueError(f"{folder} holds several runs of {twice[keys].iloc[0].to_dict()}: {names}; remove one")
    # Runs from before the state was recorded are AdamMini's: first moments and second-moment scalars in fp32.
    known = [
        4 * (p + v) if pd.isna(b) else b
        for p, v, b in table[["parameters", "second_moment_scalars", "state_bytes"]].to_numpy()
    ]
    table["state_bytes"] = np.array(known, dtype=np.int64)
    left_out = table.attrs["left_out"]
    return Study(folder.name, table.drop(columns="config"), varied, shared, left_out)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config: ``model.dim`` and so on; lists become texts, so that they can be compared."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= {f"{key}.{inner}": part for inner, part in _flat(value).items()}
        else:
            out[key] = str(value) if isinstance(value, list) else value
    return out


def _varied(configs: list[dict[str, Any]], arms: list[str]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Return the fields that vary within an arm with their sorted values, and the fields in which nothing varies."""
    varied, shared = {}, {}
    for key in dict.fromkeys(key for config in configs for key in config if key not in _COMMON):
        by_arm: dict[str, set[Any]] = {}
        for config, arm in zip(configs, arms, strict=True):
            by_arm.setdefault(arm, set()).add(config.get(key))
        values = set().union(*by_arm.values())
        if len(values) == 1:
            shared[key] = values.pop()
        elif max(map(len, by_arm.values())) > 1:
            varied[key] = sorted(values, key=lambda value: (isinstance(value, str), value is None, value or 0))
    return _independent(varied, configs), shared


def _independent(varied: dict[str, list[Any]], configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Drop fields that follow from the ones before them, such as the feed-forward width from the width."""
    kept: list[str] = []
    for key in varied:
        known = {tuple(config.get(other) for other in kept) for config in configs}
        if len({(*(config.get(other) for other in kept), config.get(key)) for config in configs}) > len(known):
            kept.append(key)
    return {key: varied[key] for key in kept}


def _in_words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('model.')} {_value(value)}" for key, value in row.items())


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(study: Study) -> pd.DataFrame:
    """Return one row per condition, arm and learning rate.

    Columns: condition, arm, lr, ``best`` (whether it is the arm's best rate in the condition), n, diverged, ``loss``
    (over the runs that finished, None if none did), ``difference`` (minus the baseline at the same rate), ``at_best``
    (minus the baseline, each at its best rate; only where ``best``), ``why`` a difference is missing, scalars,
    state_bytes, parameters. Losses and differences are Intervals.
    """
    rows = []
    for condition in study.conditions:
        runs = study.of(condition)
        rates = best_rates(runs)
        for (arm, lr), group in runs.groupby(["arm", "lr"], sort=True):
            finished = group.final_val_loss[np.isfinite(group.final_val_loss)].tolist()
            difference, why = _difference(study, runs, str(arm), float(lr))
            best = rates[str(arm)] == lr
            first = group.iloc[0]
            rows.append(
                {
                    "condition": condition,
                    "arm": arm,
                    "lr": lr,
                    "best": best,
                    "n": len(group),
                    "diverged": len(group) - len(finished),
                    "loss": t_interval(finished) if finished else None,
                    "difference": difference,
                    "at_best": _difference(study, runs, str(arm), None)[0] if best else None,
                    "why": why,
                    "scalars": int(first.second_moment_scalars),
                    "state_bytes": int(first.state_bytes),
                    "parameters": int(first.parameters),
                }
            )
    return pd.DataFrame(rows)


def _difference(study: Study, runs: pd.DataFrame, arm: str, lr: float | None) -> tuple[Interval | None, str]:
    """Return an arm's paired difference to the baseline, or None and why there is none."""
    if study.baseline is None:
        return None, "no AdamW here"
    if arm == study.baseline:
        return None, "–"
    chosen = at_best(runs) if lr is None else runs[runs.lr == lr]
    losses, base = (chosen[chosen.arm == one].set_index("seed").final_val_loss for one in (arm, study.baseline))
    # Some studies have more seeds for some arms; pairs are the seeds that both have.
    seeds = losses.index.intersection(base.index)
    if seeds.empty:
        return None, "no pair"
    difference = (losses.loc[seeds] - base.loc[seeds]).to_numpy()
    if not np.isfinite(difference).all():
        return None, "diverged"
    return t_interval(difference.tolist()), ""


def optimal(memory: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return which points no other point beats in one of the two and equals in the other, [points] of bool.

    Args:
        memory: [points].
        loss: [points]; an infinite loss is never optimal.
    """
    fewer = (memory[None] <= memory[:, None]) & (loss[None] <= loss[:, None])
    strictly = (memory[None] < memory[:, None]) | (loss[None] < loss[:, None])
    beaten: np.ndarray = (fewer & strictly).any(1)
    return ~beaten & np.isfinite(loss)


@dataclass(frozen=True)
class Curve:
    """Validation losses of an arm at one learning rate, over the runs that finished.

    Attributes:
        steps: [points].
        tokens: [points].
        mean: mean over seeds, [points].
        low: smallest, [points].
        high: largest, [points].
        n: number of runs.
    """

    steps: np.ndarray
    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int


def curve(runs: pd.DataFrame, arm: str, lr: float) -> Curve | None:
    """Return the curve of an arm at a learning rate within one condition; None if no run finished."""
    chosen = runs[(runs.arm == arm) & (runs.lr == lr) & (runs.state == "finished")]
    if chosen.empty:
        return None
    losses = np.array([[point["val_loss"] for point in points] for points in chosen.curve])
    steps, tokens = (np.array([point[key] for point in chosen.curve.iloc[0]]) for key in ("step", "tokens"))
    return Curve(steps, tokens, losses.mean(0), losses.min(0), losses.max(0), len(chosen))
