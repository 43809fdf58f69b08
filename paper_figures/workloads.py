"""Tables and figure of the workloads: ``python -m paper_figures.workloads --docs docs/workloads.md``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from analysis import workloads
from analysis.ablation import BASELINE
from analysis.stats import Interval
from analysis.workloads import Row, Workload
from paper_figures.commandline import refusals
from paper_figures.pages import illustrate, replace
from paper_figures.style import ARM_COLOURS, save, setup

BEGIN, END = "<!-- tables begin: written by python -m paper_figures.workloads -->", "<!-- tables end -->"
COLUMNS = 4


def table(workload: Workload) -> list[str]:
    """Return a workload's arms as Markdown, lowest loss first."""
    names = [name.replace("_", " ") for name in workload.metrics]
    heading = ["arm", "best rate", "held-out loss", "minus AdamW, paired", "differs", *names, "second-moment scalars"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    return lines + [f"| {' | '.join(_cells(row, workload.metrics))} |" for row in workload.rows]


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    one = row.comparison
    rate = f"{one.lr:g}" + (" (end of the grid)" if one.at_edge else "")
    loss = f"{one.loss:.4f}" if math.isfinite(one.loss) else "diverged"
    difference = "–" if one.difference is None else f"{plus_minus(one.difference, '+.4f')}, n = {one.n}"
    measured = [plus_minus(row.metrics[name], ".4f") if name in row.metrics else "–" for name in metrics]
    return [f"`{one.arm}`", rate, loss, difference, workloads.differs(row), *measured, f"{one.scalars:,}"]


def plus_minus(found: Interval, form: str) -> str:
    """Return a mean ± half its interval; the mean alone for a single value."""
    mean = format(found.mean, form)
    return f"{mean} ± {format(found.half, form.lstrip('+'))}" if math.isfinite(found.half) else mean


def draw(found: Sequence[Workload], out: Path) -> Path:
    """Draw held-out loss against steps, a panel per workload and a line per arm at its best rate."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.9 * columns, 2.5 * rows + 0.5), squeeze=False)
    for axes, workload in zip(grid.flat, found, strict=False):
        for arm, (steps, losses) in workloads.curves(workload).items():
            axes.plot(steps, losses, color=ARM_COLOURS.get(arm), label="AdamW" if arm == BASELINE else arm, lw=1.2)
        n = sorted({row.comparison.n for row in workload.rows if row.comparison.arm != BASELINE})
        axes.set_title(f"{workload.name.replace('_', ' ')} (n = {' or '.join(map(str, n))})")
        axes.set_xlabel("step")
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    for left in grid[:, 0]:
        left.set_ylabel("held-out loss")
    handles = {name: h for axes in grid.flat for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, 2 * columns))
    return save(figure, out, "workloads")


def tables(found: Sequence[Workload]) -> str:
    """Return the tables of all workloads as Markdown, and the names of those that have no results."""
    parts = [f"### {workload.name}\n\n" + "\n".join(table(workload)) for workload in found]
    missing = [name for name in workloads.NAMES if name not in {workload.name for workload in found}]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        parts.append(f'Not run yet: {names}. To run them: `make workloads ONLY="{" ".join(missing)}"`.')
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Draw the figure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced; without it, they go to --out")
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError, OSError):
        found = workloads.load(arguments.results)
        setup()
        figure, written = draw(found, arguments.out), tables(found)
        if arguments.docs is None:
            (arguments.out / "workloads.md").write_text(written + "\n", encoding="utf-8")
        else:
            replace(arguments.docs, written, BEGIN, END)
            illustrate(arguments.docs, [figure])
    print(f"{sum(len(one.setting.runs) for one in found)} runs of {len(found)} workloads; {figure}")


if __name__ == "__main__":
    main()
