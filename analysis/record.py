"""The map of learning rate, warm-up and clipping: which runs break, and what goes with it. See docs/protocol.md."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE
from analysis.settings import Setting

WORSE = 0.5
"""Nats above AdamW's best mean loss from which a run counts as broken, as a diverged one does."""


def table(settings: Sequence[Setting]) -> pd.DataFrame:
    """Return one row per run of the map: arm, lr, seed, warmup, clip, final_val_loss, diverged and broken.

    Args:
        settings: the settings of the study ``record``.

    Raises:
        ValueError: AdamW has no runs.
    """
    parts = []
    for setting in settings:
        part = setting.runs[["arm", "lr", "seed", "final_val_loss"]].copy()
        part["warmup"], part["clip"] = setting.shared["warmup"], setting.shared["clip"]
        parts.append(part.assign(diverged=setting.runs.state == "diverged"))
    runs = pd.concat(parts, ignore_index=True)
    if BASELINE not in set(runs.arm):
        raise ValueError(f"the map has no runs of {BASELINE}, with which all others are compared; run `--study record`")
    return runs.assign(broken=runs.final_val_loss > best(runs) + WORSE)


def best(runs: pd.DataFrame) -> float:
    """Return AdamW's lowest mean loss in the map, over seeds.

    Raises:
        ValueError: every cell of AdamW has a diverged run.
    """
    base = runs[runs.arm == BASELINE]
    lowest = float(base.groupby(["warmup", "clip", "lr"]).final_val_loss.mean().min())
    if not np.isfinite(lowest):
        raise ValueError(f"{BASELINE} has a diverged run in every cell of the map, so there is no loss to compare with")
    return lowest


@dataclass(frozen=True)
class Effect:
    """How often an arm breaks with and without something, counted over the same rates, seeds and other settings.

    Attributes:
        arm: the arm.
        without: number of runs that break without it.
        with_it: number that break with it.
        only_without: number of pairs of which only the run without it breaks.
        only_with: number of pairs of which only the run with it breaks.
        pairs: number of pairs.
    """

    arm: str
    without: int
    with_it: int
    only_without: int
    only_with: int
    pairs: int


def effects(runs: pd.DataFrame, field: str, without: float, with_it: float) -> list[Effect]:
    """Return the effect of clipping or warm-up on how often each arm breaks.

    Args:
        runs: the table of the map.
        field: ``clip`` or ``warmup``.
        without: its value without it.
        with_it: its value with it.
    """
    others = [key for key in ("lr", "seed", "warmup", "clip") if key != field]
    found = []
    for arm in dict.fromkeys(runs.arm):
        mine = runs[runs.arm == arm].set_index(others)
        off, on = (mine[mine[field] == value].broken for value in (without, with_it))
        both = off.index.intersection(on.index)
        off, on = off.loc[both], on.loc[both]
        counts = (int(off.sum()), int(on.sum()), int((off & ~on).sum()), int((on & ~off).sum()), len(both))
        found.append(Effect(str(arm), *counts))
    return found


def grid(runs: pd.DataFrame, arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an arm's mean loss over finished runs, number of broken runs, and number of runs, each [settings, rates].

    Settings are in the order of ``rows``; a cell without runs has NaN and zeros.
    """
    rates, mine = sorted(runs.lr.unique()), runs[runs.arm == arm]
    shape = (len(rows(runs)), len(rates))
    loss, broken, number = np.full(shape, np.nan), np.zeros(shape, int), np.zeros(shape, int)
    for (i, (warmup, clip)), (j, lr) in itertools.product(enumerate(rows(runs)), enumerate(rates)):
        cell = mine[(mine.warmup == warmup) & (mine["clip"] == clip) & (mine.lr == lr)]
        finite = cell.final_val_loss[np.isfinite(cell.final_val_loss)]
        loss[i, j] = finite.mean() if len(finite) else np.nan
        broken[i, j], number[i, j] = cell.broken.sum(), len(cell)
    return loss, broken, number


def rows(runs: pd.DataFrame) -> list[tuple[float, float]]:
    """Return the settings (warm-up, clip) of the map, warm-up first, without clipping before clipping."""
    return sorted({(float(w), float(c)) for w, c in zip(runs.warmup, runs["clip"], strict=True)})
