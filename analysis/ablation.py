"""Tables of the ablation's results. Every run is accounted for, and differences are computed within a seed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import scipy.stats

from analysis.documents import is_finite, read_object
from analysis.runs import RESULTS, config_hash, read_run, state_of
from analysis.stats import Interval, t_interval

BASELINE = "elementwise"
ARMS = (
    "elementwise",
    "adam_mini",
    "short_run",
    "pytorch_default",
    "slim_adam",
    "derived_blocks",
    "derived",
    "factored",
    "permuted",
)


def load_runs(folder: Path, *, partial: bool = False, several: bool = False) -> pd.DataFrame:
    """Load the runs of an experiment.

    Args:
        folder: results of one experiment.
        partial: leave out runs that are neither finished nor diverged; without it they raise an error. The table's
            ``attrs["left_out"]`` counts them by state.
        several: the folder may hold several settings; see ``settings.load_settings``. The table then has the column
            ``config``.

    Returns:
        One row per run: arm, lr, seed, state, final_val_loss, second_moment_scalars, state_bytes (missing for runs from
        before it was recorded), parameters, steps, curve.

    Raises:
        FileNotFoundError: the folder has no runs.
        ValueError: a run's folder is damaged or not a run, a run is neither finished nor diverged, or the folder mixes
            two experiments.
    """
    rows, left_out = [], Counter[str]()
    for run in sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")):
        state = state_of(run)
        if state in RESULTS:
            rows.append(read_run(run))
        elif partial:
            left_out[state] += 1
        else:
            raise ValueError(f"{run} is not finished: it is {state}; run `make ablation` again, or draw with --partial")
    if not rows:
        without = f" ({_count(left_out)} left out)" if left_out else ""
        raise FileNotFoundError(f"no results under {folder}{without}; run `make ablation` first")
    table = pd.DataFrame(rows).sort_values(["arm", "lr", "seed"]).reset_index(drop=True)
    table.attrs["left_out"] = dict(left_out)
    if several:
        return table
    twice = table[table.duplicated(["arm", "lr", "seed"], keep=False)]
    if len(twice):
        raise ValueError(
            f"{folder} holds several runs of {twice[['arm', 'lr', 'seed']].iloc[0].to_dict()}: "
            f"{', '.join(config_hash(config) for config in twice.config[:2])}; remove one"
        )
    _require_one_experiment(folder, table)
    return table.drop(columns="config")


def _count(states: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in states.items())


def _require_one_experiment(folder: Path, table: pd.DataFrame) -> None:
    """Check that all configs are equal except for arm, learning rate and seed, so that means over runs are meaningful.

    Raises:
        ValueError: two configs differ in another field; the message names the runs and the field.
    """
    variable = {"arm", "lr", "seed", "rules_hash"}  # Arms differ in their rules; runs of one arm must not.
    for _, group in [("", table), *table.groupby("arm")]:
        first, *others = group.config
        for other in others:
            keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            allowed = variable if group is table else variable - {"rules_hash"}
            if odd := [key for key in keys if key not in allowed]:
                raise ValueError(
                    f"{folder} mixes two experiments: {config_hash(first)} has {odd[0]}={first.get(odd[0])!r}, "
                    f"{config_hash(other)} has {other.get(odd[0])!r}; move one of the two to another folder"
                )


def require_complete(runs: pd.DataFrame, arms: Sequence[str] = ARMS) -> None:
    """Check that the grid of arms, learning rates and seeds is complete.

    Raises:
        ValueError: runs are missing; the message names them.
    """
    present = {(arm, lr, seed) for arm, lr, seed in runs[["arm", "lr", "seed"]].itertuples(index=False)}
    grid = set(itertools.product(arms, sorted(runs.lr.unique()), sorted(runs.seed.unique())))
    if missing := sorted(grid - present):
        names = "; ".join(f"arm={arm} lr={lr} seed={seed}" for arm, lr, seed in missing[:6])
        raise ValueError(f"{len(missing)} runs are missing: {names}; run `make ablation`, or draw with --partial")


def best_rates(runs: pd.DataFrame) -> dict[str, float]:
    """Return each arm's learning rate with the lowest mean final loss over seeds; a divergence counts as infinite.

    Only seeds that ran at all rates of an arm count, because seeds differ more than rates do: an interrupted study has
    fewer seeds at some rates, and a best rate may have been run on more seeds later. If the rates have no seed in
    common, those with the fewest seeds are left out until the others have one.
    """
    return {str(arm): _best_rate(group) for arm, group in runs.groupby("arm", sort=False)}


def _best_rate(runs: pd.DataFrame) -> float:
    """Return the best learning rate of one arm's runs."""
    losses = runs.pivot(index="seed", columns="lr", values="final_val_loss")
    while losses.dropna().empty:
        losses = losses.drop(columns=losses.count().idxmin())
    return float(losses.dropna().mean().idxmin())


def at_best(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at each arm's best learning rate."""
    rates = best_rates(runs)
    return runs[[rates[arm] == lr for arm, lr in zip(runs.arm, runs.lr, strict=True)]].reset_index(drop=True)


def paired_difference(
    runs: pd.DataFrame, arm: str, *, lr: float | None = None, against: str = BASELINE
) -> Interval | None:
    """Return an arm's final loss minus that of another, paired by seed.

    Args:
        runs: all runs.
        arm: the arm.
        lr: learning rate of both arms; None for the best rate of each.
        against: the other arm.

    Returns:
        The mean and its 95 % interval, or None if a run of either arm diverged.

    Raises:
        ValueError: the two arms have different seeds.
    """
    chosen = at_best(runs) if lr is None else runs[runs.lr == lr]
    losses = chosen[chosen.arm == arm].set_index("seed").final_val_loss
    base = chosen[chosen.arm == against].set_index("seed").final_val_loss
    if set(losses.index) != set(base.index) or losses.empty:
        raise ValueError(
            f"arm={arm!r} and {against!r} have different seeds: {sorted(losses.index)}, {sorted(base.index)}; run the "
            "missing ones with `make ablation`"
        )
    difference = (losses - base.loc[losses.index]).to_numpy()
    if not all(abs(value) < float("inf") for value in difference):
        return None
    return t_interval(difference.tolist())


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm at its best learning rate, lowest loss first.

    A row has the mean loss, its interval, the number of scalars and the paired difference to the baseline. The
    difference is NaN if a run diverged, or if the grid is incomplete and the two arms have different seeds.
    """
    rates, rows = best_rates(runs), []
    for arm, group in at_best(runs).groupby("arm"):
        finite = group.final_val_loss[group.final_val_loss < float("inf")].tolist()
        # An arm that diverged at every rate has no mean loss. It stays in the table, as the last row.
        loss = t_interval(finite) if finite else Interval(float("inf"), float("inf"), 0)
        try:
            difference = paired_difference(runs, str(arm))
        except ValueError:  # The seeds differ. This happens only with --partial; otherwise the grid is complete.
            difference = None
        rows.append(
            {
                "arm": arm,
                "lr": rates[str(arm)],
                "n": len(group),
                "diverged": int((group.state == "diverged").sum()),
                "loss": loss.mean,
                "loss_half": loss.half,
                "scalars": int(group.second_moment_scalars.iloc[0]),
                "parameters": int(group.parameters.iloc[0]),
                "difference": difference.mean if difference else float("nan"),
                "difference_half": difference.half if difference else float("nan"),
                "differs": bool(difference and difference.excludes_zero),
            }
        )
    return pd.DataFrame(rows).sort_values("loss").reset_index(drop=True)


def with_prediction(runs: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, float]:
    """Return the summary with each arm's predicted cost, and its Spearman rank correlation with the final loss.

    Arms whose cost is null in the file are left out: nothing was measured from which to predict it.

    Args:
        runs: all runs.
        path: JSON file that ``experiments.studies.predicted_cost`` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or an arm's prediction is missing or not a finite number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python -m experiments.studies.predicted_cost`")
    again = "run `python -m experiments.studies.predicted_cost` again"
    costs = read_object(path, again).get("cost")
    if not isinstance(costs, dict):
        raise ValueError(f"{path} has cost={costs!r}, not a number for each arm; {again}")
    table = summary(runs)
    if missing := sorted(set(table.arm) - set(costs)):
        raise ValueError(f"{path} predicts nothing for {missing}; {again}")
    table = table[[costs[arm] is not None for arm in table.arm]].reset_index(drop=True)
    if odd := [arm for arm in table.arm if not is_finite(costs[arm])]:
        raise ValueError(f"{path} has the cost {costs[odd[0]]!r} for {odd[0]!r}, which is no finite number; {again}")
    table["predicted"] = [costs[arm] for arm in table.arm]
    return table, float(scipy.stats.spearmanr(table.predicted, table.loss).statistic)
