"""The ablation's results as tables: every run accounted for, differences taken within a seed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.stats

from analysis.stats import Interval, t_interval

FORMAT_VERSION = 1
BASELINE = "elementwise"
ARMS = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "derived", "permuted")


def load_runs(folder: Path, *, partial: bool = False) -> pd.DataFrame:
    """One row per run: arm, lr, seed, state, final_val_loss, second_moment_scalars, parameters, curve.

    Args:
        folder: results of one experiment.
        partial: leave out runs that have not ended yet (instead of refusing the folder).

    Raises:
        FileNotFoundError: no runs there.
        ValueError: a damaged or foreign folder, or a run that failed or never ended.
    """
    paths = sorted(folder.glob("*/config.json"))
    rows = [_row(path.parent) for path in paths if not partial or _ended(path.parent)]
    if not rows:
        raise FileNotFoundError(f"no runs under {folder}; run `make ablation` first")
    table = pd.DataFrame(rows).sort_values(["arm", "lr", "seed"]).reset_index(drop=True)
    twice = table[table.duplicated(["arm", "lr", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"{folder} holds several runs of {twice[['arm', 'lr', 'seed']].iloc[0].to_dict()}; remove one")
    return table


def _ended(run: Path) -> bool:
    status = run / "status.json"
    return status.is_file() and json.loads(status.read_text()).get("state") in ("finished", "diverged")


def _row(run: Path) -> dict[str, Any]:
    try:
        config = json.loads((run / "config.json").read_text())
        status = json.loads((run / "status.json").read_text())
        curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f"{run} is not finished ({error.filename} is missing); run `make ablation` again") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{run} is damaged ({error}); delete it and run `make ablation` again") from error
    if status.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{run} has format_version={status.get('format_version')}; this release reads {FORMAT_VERSION}"
        )
    if status["state"] == "failed":
        raise ValueError(f"{run} failed; its status.json says why; run `make ablation` again")
    return {
        "arm": config["arm"], "lr": config["lr"], "seed": config["seed"], "state": status["state"],
        "final_val_loss": status["final_val_loss"] if status["state"] == "finished" else float("inf"),
        "second_moment_scalars": status["second_moment_scalars"], "parameters": status["parameters"],
        "steps": config["steps"], "curve": curve,
    }  # fmt: skip


def require_complete(runs: pd.DataFrame, arms: Sequence[str] = ARMS) -> None:
    """Raise ValueError naming the rows the grid of arms, learning rates and seeds lacks."""
    have = {(arm, lr, seed) for arm, lr, seed in runs[["arm", "lr", "seed"]].itertuples(index=False)}
    wanted = set(itertools.product(arms, sorted(runs.lr.unique()), sorted(runs.seed.unique())))
    if missing := sorted(wanted - have):
        names = "; ".join(f"arm={arm} lr={lr} seed={seed}" for arm, lr, seed in missing[:6])
        raise ValueError(f"{len(missing)} runs are missing: {names}; run `make ablation`, or draw with --partial")


def best_rates(runs: pd.DataFrame) -> dict[str, float]:
    """Each arm's learning rate with the lowest mean final loss over seeds; a divergence counts as infinite."""
    means = runs.groupby(["arm", "lr"]).final_val_loss.mean()
    return {arm: float(means[arm].idxmin()) for arm in runs.arm.unique()}


def at_best(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at each arm's best learning rate."""
    rates = best_rates(runs)
    return runs[[rates[arm] == lr for arm, lr in zip(runs.arm, runs.lr, strict=True)]].reset_index(drop=True)


def paired_difference(runs: pd.DataFrame, arm: str, *, lr: float | None = None) -> Interval | None:
    """Final loss of an arm minus the baseline's, seed by seed.

    Args:
        runs: all runs.
        arm: the arm.
        lr: both at this rate; None for each at its own best.

    Returns:
        The mean and its interval, or None where a run of either diverged.

    Raises:
        ValueError: the two arms have different seeds.
    """
    chosen = at_best(runs) if lr is None else runs[runs.lr == lr]
    ours = chosen[chosen.arm == arm].set_index("seed").final_val_loss
    base = chosen[chosen.arm == BASELINE].set_index("seed").final_val_loss
    if set(ours.index) != set(base.index) or ours.empty:
        raise ValueError(
            f"arm={arm!r} and {BASELINE!r} have different seeds: {sorted(ours.index)}, {sorted(base.index)}"
        )
    difference = (ours - base.loc[ours.index]).to_numpy()
    if not all(abs(value) < float("inf") for value in difference):
        return None
    return t_interval(difference.tolist())


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per arm at its best rate: mean loss, spread, scalars, difference to the baseline; best first.

    The difference is NaN where a run diverged or, in a grid with holes, the seeds do not pair.
    """
    rates, rows = best_rates(runs), []
    for arm, group in at_best(runs).groupby("arm"):
        finite = group.final_val_loss[group.final_val_loss < float("inf")].tolist()
        # An arm that diverged at every rate has no mean loss; it stays in the table, last.
        loss = t_interval(finite) if finite else Interval(float("inf"), float("inf"), 0)
        try:
            difference = paired_difference(runs, str(arm))
        except ValueError:  # seeds that do not pair: only in a grid with holes, which ``require_complete`` refuses
            difference = None
        rows.append({
            "arm": arm, "lr": rates[str(arm)], "n": len(group), "diverged": int((group.state == "diverged").sum()),
            "loss": loss.mean, "loss_half": loss.half,
            "scalars": int(group.second_moment_scalars.iloc[0]), "parameters": int(group.parameters.iloc[0]),
            "difference": difference.mean if difference else float("nan"),
            "difference_half": difference.half if difference else float("nan"),
            "differs": bool(difference and difference.excludes_zero),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("loss").reset_index(drop=True)


def with_prediction(runs: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, float]:
    """The summary with each arm's predicted cost, and Spearman's rank correlation with the final loss.

    Args:
        runs: all runs.
        path: what ``experiments.studies.predicted_cost`` wrote.

    Raises:
        FileNotFoundError: no prediction there.
        ValueError: an arm without a prediction.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python -m experiments.studies.predicted_cost`")
    costs = json.loads(path.read_text())["cost"]
    table = summary(runs)
    if missing := sorted(set(table.arm) - set(costs)):
        raise ValueError(
            f"{path} predicts nothing for {missing}; run `python -m experiments.studies.predicted_cost` again"
        )
    table["predicted"] = [costs[arm] for arm in table.arm]
    return table, float(scipy.stats.spearmanr(table.predicted, table.loss).statistic)
