"""Draw the role study's figure and write its tables from stored results.

python -m paper_figures.role_study [--results results/role_study] [--docs docs/role_study.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from analysis import role_study
from analysis.role_study import BAR, FIT, HELD_OUT, MIXED, OUTSIDE, Block, Correlations, Study
from paper_figures.commandline import refusals
from paper_figures.pages import replace
from paper_figures.style import COLOURS, ROLE_COLOURS, role_name, save, setup

BEGIN, END = "<!-- tables begin: written by python -m paper_figures.role_study -->", "<!-- tables end -->"
TITLES = {"llama": "Llama", "gpt": "GPT", "python-stdlib": "standard library", "enwik8": "enwik8"}
MARKERS = {
    "TENSOR": "X",
    "ATTENTION_HEAD": "D",
    "TOKEN": "s",
    "OUT_NEURON": "o",
    "IN_NEURON": "^",
    "FACTORED": "*",
}


def title(pair: tuple[str, str]) -> str:
    """Return a model and a corpus in words."""
    return f"{TITLES[pair[0]]}, {TITLES[pair[1]]}"


def draw(study: Study, out: Path) -> Path:
    """Plot the gaps against the winning criterion, fitted and held out, and the rank correlations of all criteria."""
    figure, grid = plt.subplots(1, 3, figsize=(14.5, 4.6), width_ratios=(1, 1, 0.9))
    best = role_study.winner(study)[0]
    for axes, pair, what in zip(grid, (FIT, HELD_OUT), ("fit", "held out"), strict=False):
        cells = role_study.blocks(study, *pair)
        if cells:
            column = role_study.names(study).index(best)
            _scatter(axes, cells, column, _colours(study))
            rank = float(role_study.spearman(*role_study.pooled(list(cells.values())))[column])
            axes.set_title(f"{title(pair)} ({what}): rank correlation {rank:.2f}")
            axes.set_xlabel(f"{best}, measured on AdamW")
    grid[0].set_ylabel("final loss minus AdamW's, mean over seeds (nats)")
    _legend(grid[1], _colours(study), sorted(study.gaps.lr.unique()))
    _bars(grid[2], study)
    return save(figure, out, "role_study")


def _colours(study: Study) -> dict[str, str]:
    """Return a colour for every role of the study."""
    roles = list(dict.fromkeys(arm.split("/")[0] for arm in study.criteria.arm))
    return dict(zip(roles, (*ROLE_COLOURS, "#B8B000"), strict=False))


def _scatter(axes: Axes, cells: Mapping[float, Block], column: int, colours: Mapping[str, str]) -> None:
    """Plot every arm of some cells: colour by role, marker by unit, filled at the highest learning rate."""
    for lr, cell in cells.items():
        x, y = cell.criteria[:, :, column].mean(0), cell.gap.mean(0)
        for arm, value, gap in zip(cell.arms, x, y, strict=True):
            role, unit = arm.split("/")
            face = colours[role] if lr == max(cells) else "none"
            axes.plot(max(value, 1e-12), gap, MARKERS[unit], color=colours[role], mfc=face, ms=6, mew=1)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.margins(y=0.08)
    axes.axhline(0, color=COLOURS[6], lw=0.8)


def _legend(axes: Axes, colours: Mapping[str, str], rates: Sequence[float]) -> None:
    """Explain colours and markers outside the axes."""
    for role, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=role_name(role))
    for unit, marker in MARKERS.items():
        axes.plot([], [], marker, color="none", mec=COLOURS[6], label=unit.lower().replace("_", " "))
    hollow, filled = min(rates), max(rates)
    axes.plot([], [], "o", color="none", mec=COLOURS[6], label=f"hollow: lr {hollow:g}")
    axes.plot([], [], "o", color=COLOURS[6], label=f"filled: lr {filled:g}")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=9)


def _bars(axes: Axes, study: Study) -> None:
    """Plot the rank correlation of every criterion on the fit cells and, with its interval, on the held-out cells."""
    names = role_study.names(study)
    positions = np.arange(len(names))
    for offset, pair, colour, what in ((-0.18, FIT, COLOURS[0], "fit"), (0.18, HELD_OUT, COLOURS[1], "held out")):
        cells = list(role_study.blocks(study, *pair).values())
        if cells:
            found = role_study.correlations(cells)
            errors = np.abs(found.rank_interval - found.rank)
            axes.errorbar(
                found.rank, positions + offset, xerr=errors, fmt="o", color=colour, capsize=2, ms=4, label=what
            )
    axes.axvline(BAR, color=COLOURS[6], ls="--", lw=1)
    axes.set_yticks(positions, names)
    axes.invert_yaxis()
    axes.set_title("all criteria, both learning rates")
    axes.set_xlabel(f"rank correlation with the gap (dashed: the bar, {BAR})")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.12), frameon=True)


def _mean(value: float, half: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f} ± {half:.{digits}f}" if np.isfinite(half) else f"{value:+.{digits}f}"


def _between(found: Correlations, i: int) -> str:
    low, high = found.rank_interval[:, i]
    return f"{found.rank[i]:.2f} [{low:.2f}, {high:.2f}]"


def correlation_table(study: Study) -> list[str]:
    """Return the rank correlation of every criterion: on the fit cells, the held-out cells and the mixed pairs."""
    best, scores = role_study.winner(study)
    held = {lr: [cell] for lr, cell in role_study.blocks(study, *HELD_OUT).items()}
    groups = {f"held out, lr {lr:g}": cell for lr, cell in held.items()}
    groups |= {"**held out, pooled**": list(role_study.blocks(study, *HELD_OUT).values())}
    groups |= {f"mixed: {title(pair)}": list(role_study.blocks(study, *pair).values()) for pair in MIXED}
    groups = {name: cells for name, cells in groups.items() if cells}
    found = {name: role_study.correlations(cells) for name, cells in groups.items()}
    lines = [
        "| criterion | fit, mean of two | " + " | ".join(groups) + " |",
        "|---|---|" + "---|" * len(groups),
    ]
    for i, name in enumerate(role_study.names(study)):
        label = (
            f"**`{name}`** (winner)"
            if name == best
            else f"`{name}`" + (f" ({OUTSIDE[name]})" if name in OUTSIDE else "")
        )
        lines.append(f"| {label} | {scores[name]:.2f} | " + " | ".join(_between(f, i) for f in found.values()) + " |")
    fit = list(role_study.blocks(study, *FIT).values())
    limits = [f"{np.mean([role_study.ceiling([c]) for c in fit]):.2f}"]
    limits += [f"{role_study.ceiling(cells):.2f}" for cells in groups.values()]
    lines.append("| ceiling: one seed against the others | " + " | ".join(limits) + " |")
    seeds = [str(min(len(c.seeds) for c in cells)) for cells in [fit, *groups.values()]]
    lines.append("| seeds | " + " | ".join(seeds) + " |")
    points = [str(sum(len(c.arms) for c in cells)) for cells in [fit, *groups.values()]]
    return [*lines, "| points | " + " | ".join(points) + " |"]


def without_embedding_table(study: Study) -> list[str]:
    """Return the rank correlation of every criterion in every cell, without the arms of the token embedding."""
    cells = {
        (*pair, lr): [role_study.without(cell, "TOKEN_EMBEDDING")]
        for pair in (FIT, HELD_OUT, *MIXED)
        for lr, cell in role_study.blocks(study, *pair).items()
    }
    cells = dict(
        sorted(cells.items(), key=lambda item: item[0][2])
    )  # The rates beside each other, in the pairs' order.
    found = {key: role_study.correlations(cell) for key, cell in cells.items()}
    lines = ["| criterion | " + " | ".join(f"{title(key[:2])}, lr {key[2]:g}" for key in cells) + " |"]
    lines.append("|---|" + "---|" * len(cells))
    for i, name in enumerate(role_study.names(study)):
        lines.append(f"| `{name}` | " + " | ".join(_between(f, i) for f in found.values()) + " |")
    return [*lines, "| ceiling | " + " | ".join(f"{role_study.ceiling(cell):.2f}" for cell in cells.values()) + " |"]


def slope_table(study: Study) -> list[str]:
    """Return the slope of the gap on every criterion, on the fit cells and on the held-out cells."""
    pairs = {what: role_study.blocks(study, *pair) for what, pair in (("fit", FIT), ("held out", HELD_OUT))}
    found = {what: role_study.correlations(list(cells.values())) for what, cells in pairs.items() if cells}
    lines = ["| criterion | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for i, name in enumerate(role_study.names(study)):
        values = (
            f"{s.slope[i]:.2g} [{s.slope_interval[0, i]:.2g}, {s.slope_interval[1, i]:.2g}]" for s in found.values()
        )
        lines.append(f"| `{name}` | " + " | ".join(values) + " |")
    return lines


def regret_table(study: Study, factored: bool = True) -> list[str]:
    """Return the regret of every criterion, and of the units of the whole rule sets, for every pair.

    Args:
        study: the study.
        factored: whether FACTORED may be chosen.
    """
    pairs = {pair: list(role_study.blocks(study, *pair).values()) for pair in (FIT, HELD_OUT, *MIXED)}
    found = {pair: role_study.regrets(cells, factored) for pair, cells in pairs.items() if cells}
    lines = ["| choice by | " + " | ".join(map(title, found)) + " |", "|---|" + "---|" * len(found)]
    for i, name in enumerate(role_study.names(study)):
        lines.append(f"| `{name}` | " + " | ".join(f"{of[i]:.4f}" for of, _ in found.values()) + " |")
    for rules in next(iter(found.values()))[1]:
        values = " | ".join(f"{sets[rules]:.4f}" for _, sets in found.values())
        lines.append(f"| the units of `{rules}` | {values} |")
    return lines


def additivity_table(study: Study) -> list[str]:
    """Return the gap of every whole rule set beside the sum of its single-role gaps."""
    lines = ["| cell | rules | sum of single roles | whole set | whole minus sum | n |", "|---|---|---|---|---|---|"]
    for row in role_study.additivity(study).itertuples():
        numbers = " | ".join(_mean(x.mean, x.half) for x in (row.sum, row.whole, row.difference))
        lines.append(f"| {title((row.model, row.data))}, lr {row.lr:g} | {row.rules} | {numbers} | {row.whole.n} |")
    return lines


def set_table(study: Study) -> list[str]:
    """Return paired differences of whole rule sets, over all cells, the mixed ones, and the lower learning rate."""
    low = float(study.gaps.lr.min())
    lines = [f"| difference | all cells | mixed cells | lr {low:g} |", "|---|---|---|---|"]
    pairs = [("derived_row", "derived_blocks"), ("all_factored", "factored")]
    pairs += [(rules, role_study.ADAMW) for rules in role_study.WHOLE_SETS]
    for arm, other in pairs:
        found = (role_study.difference(study, arm, other, **only) for only in ({}, {"mixed": True}, {"lr": low}))
        lines.append(f"| {arm} minus {other} | " + " | ".join(_mean(x.mean, x.half) for x in found) + " |")
    return lines


def gap_table(study: Study) -> list[str]:
    """Return the mean gap of every role and unit, in every cell."""
    cells = {(*pair, lr): c for pair in (FIT, *MIXED, HELD_OUT) for lr, c in role_study.blocks(study, *pair).items()}
    lines = ["| arm | " + " | ".join(f"{title(key[:2])}, lr {key[2]:g}" for key in cells) + " |"]
    lines.append("|---|" + "---|" * len(cells))
    for arm in dict.fromkeys(arm for cell in cells.values() for arm in cell.arms):
        values = [f"{c.gap.mean(0)[c.arms.index(arm)]:+.4f}" if arm in c.arms else "–" for c in cells.values()]
        lines.append(f"| {arm} | " + " | ".join(values) + " |")
    twins = role_study.noise(study)
    lines.append("| twin | " + " | ".join(_mean(twins[key].mean, twins[key].half, 5) for key in cells) + " |")
    return lines


def tables(study: Study) -> str:
    """Return all tables as Markdown."""
    parts = (
        (
            f"{study.runs} runs. Rank correlation of each criterion with the gap (95 % bootstrap interval):",
            correlation_table,
        ),
        ("The same without the token embedding, for every cell (found after the outcome):", without_embedding_table),
        ("Slope of the gap on each criterion (nats per unit):", slope_table),
        ("Regret (nats), both learning rates:", regret_table),
        ("Regret among the units without FACTORED:", lambda study: regret_table(study, factored=False)),
        ("Whole rule sets (mean over cells within a seed ± 95 % t-interval over seeds, nats):", set_table),
        ("Additivity (mean ± 95 % t-interval over seeds, nats):", additivity_table),
        ("All gaps (mean over seeds, nats), and the twin's with its 95 % t-interval:", gap_table),
    )
    return "\n\n".join(f"{intro}\n\n" + "\n".join(make(study)) for intro, make in parts)


def main(argv: list[str] | None = None) -> None:
    """Draw the figure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/role_study"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced; without it, they go to --out")
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError, OSError):
        study = role_study.load(arguments.results)
        best = role_study.winner(study)[0]
        arguments.out.mkdir(parents=True, exist_ok=True)
        setup()
        figure, written = draw(study, arguments.out), tables(study)
        if arguments.docs is not None:
            replace(arguments.docs, written, BEGIN, END)
        else:
            (arguments.out / "role_study.md").write_text(written + "\n", encoding="utf-8")
    print(f"{study.runs} runs; the winner on the fit cells is {best}; {figure}")


if __name__ == "__main__":
    main()
