"""The ablation's results as tables: every run accounted for, differences taken within a seed."""

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
ARMS = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "derived", "permuted")


def load_runs(folder: Path, *, partial: bool = False) -> pd.DataFrame:
    """One row per run: arm, lr, seed, state, final_val_loss, second_moment_scalars, parameters, curve.

    Args:
        folder: results of one experiment.
        partial: leave out runs that are not results (instead of refusing the folder). How many, by their state, is
            in ``attrs["left_out"]`` of the table.

    Raises:
        FileNotFoundError: no runs there.
        ValueError: a damaged or foreign folder, a run that is neither finished nor diverged, or runs of two
            experiments.
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
    twice = table[table.duplicated(["arm", "lr", "seed"], keep=False)]
    if len(twice):
        raise ValueError(
            f"{folder} holds several runs of {twice[['arm', 'lr', 'seed']].iloc[0].to_dict()}: "
            f"{', '.join(config_hash(config) for config in twice.config[:2])}; remove one"
        )
    _require_one_experiment(folder, table)
    table = table.drop(columns="config")
    table.attrs["left_out"] = dict(left_out)
    return table


def _count(states: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in states.items())


def _require_one_experiment(folder: Path, table: pd.DataFrame) -> None:
    """All runs have one config but for arm, rate and seed; of two experiments in one folder no mean means anything.

    Raises:
        ValueError: they have not, naming two runs and the field.
    """
    free = {"arm", "lr", "seed", "rules_hash"}  # each arm has its rules: within an arm they are one content
    for _, group in [("", table), *table.groupby("arm")]:
        first, *others = group.config
        for other in others:
            keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            kept = free if group is table else free - {"rules_hash"}
            if odd := [key for key in keys if key not in kept]:
                raise ValueError(
                    f"{folder} mixes two experiments: {config_hash(first)} has {odd[0]}={first.get(odd[0])!r}, "
                    f"{config_hash(other)} has {other.get(odd[0])!r}; move one kind to a folder of its own"
                )


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
        ValueError: a damaged file, or an arm whose prediction is missing or no finite number.
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
    if odd := [arm for arm in table.arm if not is_finite(costs[arm])]:
        raise ValueError(f"{path} has the cost {costs[odd[0]]!r} for {odd[0]!r}, which is no finite number; {again}")
    table["predicted"] = [costs[arm] for arm in table.arm]
    return table, float(scipy.stats.spearmanr(table.predicted, table.loss).statistic)
