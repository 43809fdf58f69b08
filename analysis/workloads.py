"""Workloads: every arm at its best rate, what else was measured, and what finished runs left to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE, at_best
from analysis.documents import read_object
from analysis.runs import RESULTS, config_hash, state_of
from analysis.settings import Comparison, Setting, compare, load_settings
from analysis.stats import Interval, t_interval

NAMES = (
    "gpt2",
    "llama",
    "sft",
    "sft_lora",
    "reward",
    "remax",
    "rloo",
    "resnet",
    "resnet_batchnorm",
    "vit",
    "gcn",
    "gat",
    "diffusion",
    "dit",
)
"""The workloads, in the order in which they are shown."""
_EVERY_RECORD = ("step", "tokens", "train_loss", "val_loss", "lr", "seconds")
_OWN_FILES = ("config.json", "environment.json", "status.json")


@dataclass(frozen=True)
class Row:
    """An arm of a workload, at its best rate.

    Attributes:
        comparison: its loss and its paired difference to AdamW.
        metrics: what else the last record has, such as accuracy -> mean over the finished runs.
    """

    comparison: Comparison
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class Workload:
    """The runs of a workload.

    Attributes:
        name: its name.
        folder: its folder of results.
        setting: its runs, and what they share.
        rows: its arms, lowest loss first.
    """

    name: str
    folder: Path
    setting: Setting
    rows: list[Row]

    @property
    def metrics(self) -> list[str]:
        """Names of what is measured besides the loss."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))


def load(root: Path, profile: str = "cpu", *, required: bool = True) -> list[Workload]:
    """Load every workload that has results. Runs that are neither finished nor diverged are left out.

    Args:
        root: root of the results folders.
        profile: profile of the runs.
        required: whether it is an error if no workload has results.

    Raises:
        FileNotFoundError: no workload has results, and one is required.
        ValueError: a run is damaged, a workload mixes settings, or it has no runs of AdamW.
    """
    found = []
    for name in NAMES:
        folder = root / f"{name}_{profile}"
        if not folder.is_dir():
            continue
        if not any(state_of(run) in RESULTS for run in folder.glob("*") if (run / "config.json").is_file()):
            continue  # begun, and nothing has ended yet
        settings = load_settings(folder, partial=True)
        if len(settings) > 1:
            raise ValueError(f"{folder} mixes {len(settings)} settings; move all but one to another folder")
        (setting,) = settings
        found.append(Workload(name, folder, setting, rows(setting.runs)))
    if not found and required:
        raise FileNotFoundError(f"no workload has results under {root}; run `make workloads PROFILE={profile}`")
    return found


def rows(runs: pd.DataFrame) -> list[Row]:
    """Return every arm at its best rate, lowest loss first."""
    best = at_best(runs)
    return [Row(one, _metrics(best[(best.arm == one.arm) & (best.state == "finished")])) for one in compare(runs)]


def _metrics(runs: pd.DataFrame) -> dict[str, Interval]:
    """Return the mean of each further number of the last records."""
    last = [points[-1] for points in runs.curve]
    names = [key for key in dict.fromkeys(key for point in last for key in point) if key not in _EVERY_RECORD]
    return {name: t_interval([point[name] for point in last]) for name in names if all(name in p for p in last)}


def differs(row: Row) -> str:
    """Return in words whether an arm differs from AdamW: by an interval of paired differences that excludes zero."""
    one = row.comparison
    if one.arm == BASELINE:
        return "–"
    if one.difference is None:
        return "diverged" if one.diverged else "no pair"
    if one.n < 2:
        return "n = 1"
    if not one.difference.excludes_zero:
        return "no"
    return "worse" if one.difference.mean > 0 else "better"


def curves(workload: Workload) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return arm -> (steps [points], mean held-out loss over its finished runs [points]), at its best rate."""
    found = {}
    for arm, group in at_best(workload.setting.runs).groupby("arm"):
        done = group[group.state == "finished"].curve.tolist()
        if done:
            steps = np.array([point["step"] for point in done[0]])
            found[str(arm)] = steps, np.mean([[point["val_loss"] for point in points] for points in done], axis=0)
    return found


def shown(workload: Workload, arm: str = BASELINE, seed: int = 0) -> dict[str, Any]:
    """Return what the run of an arm at its best rate left to look at: name -> document; empty if it left nothing.

    Args:
        workload: the workload.
        arm: the arm.
        seed: seed of the run.

    Raises:
        ValueError: a file is damaged.
    """
    best = at_best(workload.setting.runs)
    run = best[(best.arm == arm) & (best.seed == seed)]
    if run.empty:
        return {}
    folder = workload.folder / config_hash(run.iloc[0].config)
    left = sorted(path for path in folder.glob("*.json") if path.name not in _OWN_FILES)
    return {path.stem: read_object(path, "delete the run's folder and run it again") for path in left}
