"""The ablation's results as tables: every run accounted for, differences taken within a seed."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.stats

from analysis.stats import Interval, t_interval

FORMAT_VERSION = 1
RESULTS = ("finished", "diverged")
"""States of a run that are results."""
BASELINE = "elementwise"
ARMS = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "derived", "permuted")


def load_runs(folder: Path, *, partial: bool = False) -> pd.DataFrame:
    """One row per run: arm, lr, seed, state, final_val_loss, second_moment_scalars, parameters, curve.

    Args:
        folder: results of one experiment.
        partial: leave out runs that are not results (instead of refusing the folder). How many, by their state, is
            in ``attrs["left_out"]`` of the table.

    Raises:
        FileNotFoundError: no runs there.
        ValueError: a damaged or foreign folder, or a run that is neither finished nor diverged.
    """
    rows, left_out = [], Counter[str]()
    for path in sorted(folder.glob("*/config.json")):
        state = _state(path.parent)
        if state in RESULTS:
            rows.append(_row(path.parent))
        elif partial:
            left_out[state] += 1
        else:
            raise ValueError(
                f"{path.parent} is not finished: it is {state}; run `make ablation` again, or draw with --partial"
            )
    if not rows:
        raise FileNotFoundError(f"no results under {folder}; run `make ablation` first")
    table = pd.DataFrame(rows).sort_values(["arm", "lr", "seed"]).reset_index(drop=True)
    twice = table[table.duplicated(["arm", "lr", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"{folder} holds several runs of {twice[['arm', 'lr', 'seed']].iloc[0].to_dict()}; remove one")
    table.attrs["left_out"] = dict(left_out)
    return table


def _state(run: Path) -> str:
    """The state that a run's status names, or "without a status"."""
    path = run / "status.json"
    if not path.is_file():
        return "without a status"
    status = _read(path)
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        raise _damaged(run, "its status.json names no state")
    if status.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{run} has format_version={status.get('format_version')}; this release reads {FORMAT_VERSION}"
        )
    return str(status["state"])


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error


def _damaged(run: Path, why: str) -> ValueError:
    """A damaged run counts as finished for the runner, so its folder has to go before it is run again."""
    return ValueError(f"{run} is damaged ({why}); delete the folder and run `make ablation` again")


def _curve(run: Path) -> list[dict[str, Any]]:
    """The points of ``metrics.jsonl``; none where there is no file, as when a run diverges before its first."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(run, f"{path.name}: {error}") from error


def _row(run: Path) -> dict[str, Any]:
    config, status, curve = _read(run / "config.json"), _read(run / "status.json"), _curve(run)
    needed = {
        "config.json": (config, ("arm", "lr", "seed", "steps")),
        "status.json": (status, ("final_val_loss", "second_moment_scalars", "parameters")),
    }
    for name, (document, keys) in needed.items():
        if missing := [key for key in keys if not isinstance(document, dict) or key not in document]:
            raise _damaged(run, f"{name} lacks {missing[0]}")
    if status["state"] == "finished":
        last = curve[-1] if curve else {}
        if not isinstance(last, dict) or last.get("step") != config["steps"]:
            raise _damaged(
                run, f"metrics.jsonl does not reach step {config['steps']}, though status.json says finished"
            )
        loss = status["final_val_loss"]
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            raise _damaged(run, f"final_val_loss={loss!r} in status.json is no finite number, though the run finished")
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
