"""Show stored results in the terminal.

python -m analysis show                               # all experiments
python -m analysis show ablation_cpu                  # one experiment: losses by arm and learning rate
python -m analysis show ablation_cpu "factored 0.01"  # its runs of that name, with their curves
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import studies
from analysis.runs import state_of
from analysis.studies import Study

BARS = "▁▂▃▄▅▆▇█"


def experiments(root: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Yield (name, number of runs by state) of every folder of training runs under a results root.

    Raises:
        FileNotFoundError: there is none.
    """
    found = 0
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        states = Counter(state_of(run) for run in folder.glob("*") if (run / "config.json").is_file())
        if states:
            found += 1
            yield folder.name, states
    if not found:
        raise FileNotFoundError(f"no training runs under {root}; give another --results, or run `make ablation`")


def overview(runs: pd.DataFrame) -> str:
    """Return the final validation losses as text: mean ± standard deviation over seeds, by arm and learning rate."""
    rates = sorted(runs.lr.unique())
    best = runs.groupby(["arm", "lr"]).final_val_loss.mean()
    width = max(len(arm) for arm in runs.arm) + 2
    lines = ["arm".ljust(width) + "".join(f"{rate:>28g}" for rate in rates) + f"{'scalars':>12}"]
    for arm in sorted(runs.arm.unique(), key=lambda name: best[name].min()):
        cells = [_cell(runs[(runs.arm == arm) & (runs.lr == rate)], best[arm].idxmin() == rate) for rate in rates]
        scalars = runs[runs.arm == arm].second_moment_scalars.iloc[0]
        lines.append(arm.ljust(width) + "".join(cells) + f"{scalars:>12,}")
    return "\n".join(lines)


def by_condition(study: Study) -> str:
    """Return a table of final validation losses for each condition of a study."""
    parts = [f"{condition}\n{overview(study.of(condition))}".lstrip("\n") for condition in study.conditions]
    unit = "final validation loss in nats, mean ± standard deviation (seeds); * best rate of an arm"
    return "\n\n".join([*parts, unit])


def _cell(runs: pd.DataFrame, best: bool) -> str:
    diverged, losses = int((runs.state == "diverged").sum()), runs[runs.state == "finished"].final_val_loss
    if runs.empty:
        return f"{'-':>28}"
    if losses.empty:
        return f"{f'{diverged} diverged':>28}"
    spread = f" ±{losses.std():.4f}" if len(losses) > 1 else ""
    count = f"{len(losses)}, {diverged} div." if diverged else f"{len(losses)}"
    text = f"{losses.mean():.4f}{spread} ({count}){'*' if best else ' '}"
    return f"{text:>28}"


def curves(runs: pd.DataFrame, wanted: str) -> str:
    """Return every run whose name contains the text, with its curve as a line of bars, its final loss and its hash.

    A name is arm, learning rate, seed and condition.

    Raises:
        ValueError: there is none.
    """
    names = [f"{run.arm} {run.lr:g} {run.seed} {run.condition}".rstrip() for run in runs.itertuples()]
    chosen = [(name, run) for name, run in zip(names, runs.itertuples(), strict=True) if wanted in name]
    if not chosen:
        raise ValueError(f"runs={wanted!r} is in no name of a run; names are like {names[0]!r}")
    losses = [loss for _, run in chosen for loss in _losses(run.curve) if math.isfinite(loss)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    width = max(32, *(len(name) for name, _ in chosen))
    lines = [f"{name:{width}s} {_bars(run.curve, low, high)}  {_end(run)}  {run.hash}" for name, run in chosen]
    unit = f"validation loss over the run, bars from {low:.4f} to {high:.4f} nats, and the run's hash"
    return "\n".join([*lines, "", unit, "to run one again and compare: python -m experiments.rerun HASH"])


def _losses(curve: Sequence[Any]) -> list[float]:
    """Return the validation losses of a curve; one that a diverged run lacks is NaN."""
    losses = [point.get("val_loss") if isinstance(point, dict) else None for point in curve]
    return [loss if isinstance(loss, (int, float)) else math.nan for loss in losses]


def _bars(curve: Sequence[Any], low: float, high: float) -> str:
    def bar(loss: float) -> str:
        share = (loss - low) / (high - low) if high > low else 0.0
        return BARS[min(len(BARS) - 1, int(share * len(BARS)))] if math.isfinite(loss) else "x"

    return "".join(map(bar, _losses(curve)))


def _end(run: Any) -> str:
    return f"{run.final_val_loss:.4f}" if run.state == "finished" else str(run.state)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with code 2 and one line on stderr, for results that are missing or damaged.
    """
    parser = argparse.ArgumentParser(prog="python -m analysis", description=(__doc__ or "").splitlines()[0])
    show = parser.add_subparsers(required=True).add_parser("show", help="show stored results")
    show.add_argument("experiment", nargs="?", help="name of an experiment; without it, all are listed")
    show.add_argument("runs", nargs="?", help="part of a run's name: arm, learning rate, seed and condition")
    show.add_argument("--results", type=Path, default=Path("results"), help="root of the results folders (results)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.experiment is None:
            rows = [f"{name:28s} {_counted(states)}" for name, states in experiments(arguments.results)]
            text = "\n".join(rows)
        else:
            study = studies.load(arguments.results / arguments.experiment)
            text = by_condition(study) if arguments.runs is None else curves(study.runs, arguments.runs)
            if study.left_out:
                text += f"\nleft out: {_counted(study.left_out)}"
        sys.stdout.write(text + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"python -m analysis: error: {error}\n")
        raise SystemExit(2) from error


def _counted(states: Mapping[str, int]) -> str:
    names = {"without a status": "not finished"}
    return ", ".join(f"{count} {names.get(state, state)}" for state, count in sorted(states.items()))


if __name__ == "__main__":
    main()
