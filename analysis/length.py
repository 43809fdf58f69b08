"""Size and length: the gap to AdamW by parameters and by tokens per parameter, and a fit. See docs/protocol.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.ablation import BASELINE, best_rates
from analysis.settings import Setting
from analysis.stats import Interval, t_interval


def gaps(settings: Sequence[Setting]) -> pd.DataFrame:
    """Return one row per cell, arm and seed: parameters, ratio (tokens per parameter), arm, seed, lr, base_lr, gap.

    The gap is the arm's final loss minus AdamW's with the same seed, both at their best rates. It is infinite if the
    arm's run diverged, and NaN if AdamW's did.

    Args:
        settings: the settings of the study ``length``.

    Raises:
        ValueError: a cell has no runs of AdamW.
    """
    rows = []
    for setting in settings:
        runs, shared = setting.runs, setting.shared
        if BASELINE not in set(runs.arm):
            raise ValueError(f"a cell of {shared['steps']} steps has no runs of {BASELINE}; run `--study length`")
        parameters = int(runs.parameters.max())
        ratio = shared["steps"] * shared["batch"] * shared["seq_len"] / parameters
        rates = best_rates(runs)
        base = _losses(runs, BASELINE, rates[BASELINE])
        for arm in rates:
            if arm == BASELINE:
                continue
            for seed, loss in _losses(runs, arm, rates[arm]).items():
                if seed in base:
                    gap = loss - base[seed] if np.isfinite(base[seed]) else np.nan
                    rows.append((parameters, ratio, arm, seed, rates[arm], rates[BASELINE], gap))
    columns = ["parameters", "ratio", "arm", "seed", "lr", "base_lr", "gap"]
    return pd.DataFrame(rows, columns=columns).sort_values(["parameters", "ratio", "arm", "seed"], ignore_index=True)


def _losses(runs: pd.DataFrame, arm: str, lr: float) -> dict[int, float]:
    chosen = runs[(runs.arm == arm) & (runs.lr == lr)]
    return dict(zip(chosen.seed, chosen.final_val_loss, strict=True))


@dataclass(frozen=True)
class Cell:
    """An arm's gap at one size and length.

    Attributes:
        parameters: size of the model.
        ratio: tokens per parameter.
        gap: mean over seeds with its 95 % t-interval; None if a run diverged.
        lr: the arm's best rate.
        base_lr: AdamW's.
    """

    parameters: int
    ratio: float
    gap: Interval | None
    lr: float
    base_lr: float


def cells(table: pd.DataFrame, arm: str) -> list[Cell]:
    """Return an arm's cells, by size and length.

    Args:
        table: what ``gaps`` returned.
        arm: the arm.
    """
    found = []
    for (parameters, ratio), group in table[table.arm == arm].groupby(["parameters", "ratio"]):
        complete = bool(np.isfinite(group.gap).all())
        first = group.iloc[0]
        gap = t_interval(group.gap.tolist()) if complete else None
        found.append(Cell(int(parameters), float(ratio), gap, float(first.lr), float(first.base_lr)))
    return found


@dataclass(frozen=True)
class Fit:
    """gap = a + b log2(tokens per parameter / 20) + c log2(parameters / 1e6), in nats.

    Attributes:
        a: gap of a model of a million parameters at 20 tokens per parameter.
        b: change of the gap when the length doubles.
        c: change of the gap when the size doubles.
        seeds: number of seeds; each gives one fit, and the intervals are over them.
        left_out: number of cells in which a run diverged.
        residual: root mean square of the fit's error in the cells, over all seeds.
    """

    a: Interval
    b: Interval
    c: Interval
    seeds: int
    left_out: int
    residual: float


def fit(table: pd.DataFrame, arm: str) -> Fit:
    """Fit an arm's gap, seed by seed, over the cells that all seeds have.

    Args:
        table: what ``gaps`` returned.
        arm: the arm.

    Raises:
        ValueError: there are fewer than four cells, or they do not vary in both size and length.
    """
    wide = table[table.arm == arm].pivot(index=["parameters", "ratio"], columns="seed", values="gap")
    used = wide[np.isfinite(wide).all(axis=1)]
    size, ratio = (used.index.get_level_values(key).to_numpy(float) for key in ("parameters", "ratio"))
    design = np.stack([np.ones(len(used)), np.log2(ratio / 20), np.log2(size / 1e6)], axis=1)
    if len(used) < 4 or np.linalg.matrix_rank(design) < 3:
        raise ValueError(f"arm={arm!r} has {len(used)} complete cells, too few to fit size and length; run more")
    found, *_ = np.linalg.lstsq(design, used.to_numpy(), rcond=None)
    residual = float(np.sqrt(np.mean((used.to_numpy() - design @ found) ** 2)))
    a, b, c = (t_interval(values.tolist()) for values in found)
    return Fit(a, b, c, found.shape[1], int(np.isinf(wide).any(axis=1).sum()), residual)
