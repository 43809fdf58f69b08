"""Tables and figures of the suite: headline, size and length, rivals, the map, sensitivity, trajectories.

python -m paper_figures.suite --docs docs/suite.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import length as measured
from analysis import record
from analysis import sensitivity as sensitive_to
from analysis import trajectories as of_ways
from analysis.ablation import BASELINE
from analysis.runs import RESULTS, state_of
from analysis.settings import Setting, compare, load_settings
from paper_figures import headline, length, sensitivity, trajectories
from paper_figures.commandline import refusals
from paper_figures.pages import illustrate, replace
from paper_figures.style import save, setup

BEGIN, END = "<!-- tables begin: written by python -m paper_figures.suite -->", "<!-- tables end -->"


def record_map(runs: pd.DataFrame, out: Path) -> Path:
    """Draw the loss of every arm over learning rate, warm-up and clipping, with the number of runs that break."""
    arms, rates, rows = _arms(runs), sorted(runs.lr.unique()), record.rows(runs)
    figure, grid = plt.subplots(1, len(arms), figsize=(3.1 * len(arms) + 0.9, 3.4), sharey=True, squeeze=False)
    base = record.best(runs)
    for axes, arm in zip(grid[0], arms, strict=True):
        loss, broken, number = record.grid(runs, arm)
        shown = np.where(np.isnan(loss) & (number > 0), base + 2, loss) - base
        image = axes.imshow(shown, vmin=0, vmax=1, cmap="cividis_r", aspect="auto")
        for i, j in np.ndindex(*loss.shape):
            if number[i, j]:
                count = "broke" if number[i, j] == 1 else f"{broken[i, j]} of {number[i, j]} broke"
                worst = f"\n{count}" if broken[i, j] else ""
                text = (
                    f"{loss[i, j] - base:+.2f}{worst}" if np.isfinite(loss[i, j]) else f"all {number[i, j]}\ndiverged"
                )
                axes.text(j, i, text, ha="center", va="center", fontsize=6.2, color="w" if shown[i, j] > 0.45 else "k")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(rows)), [f"{100 * w:g} %, {'clip ' + f'{c:g}' if c else 'no clip'}" for w, c in rows])
        axes.set_title("AdamW" if arm == BASELINE else arm)
        axes.set_xlabel("learning rate")
        axes.grid(False)
    grid[0][0].set_ylabel("warm-up, clipping")
    figure.colorbar(image, ax=grid[0], label="nats above AdamW's best", shrink=0.8)
    return save(figure, out, "record_map")


def _arms(runs: pd.DataFrame) -> list[str]:
    """Return the arms, AdamW first."""
    return sorted(runs.arm.unique(), key=lambda arm: (arm != BASELINE, arm))


def rivals_table(setting: Setting) -> list[str]:
    """Return the arms of a setting, each at its best rate, against AdamW."""
    runs = setting.runs
    lines = [
        "| arm | best rate | at the edge of its grid | final loss | minus AdamW, paired | n | diverged there, anywhere "
        "| state, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in compare(runs):
        difference = f"{one.difference.mean:+.4f} ± {one.difference.half:.4f}" if one.difference and one.n > 1 else "–"
        stored = runs[runs.arm == one.arm].state_bytes.dropna()
        state = f"{stored.iloc[0] / 1e6:.2f}" if len(stored) else "–"
        edge = "yes" if one.at_edge else "no"
        cells = (
            f"`{one.arm}`",
            f"{one.lr:g}",
            edge,
            f"{one.loss:.4f}",
            difference,
            one.n,
            f"{one.diverged}, {one.diverged_anywhere}",
            state,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def effect_table(runs: pd.DataFrame) -> list[str]:
    """Return how often each arm breaks with and without clipping and warm-up."""
    lines = [
        "| arm | what | runs that break without | with | only without | only with | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    largest = max(runs.warmup)
    for what, field, value in (
        ("clipping", "clip", max(runs["clip"])),
        (f"{100 * largest:g} % warm-up", "warmup", largest),
    ):
        for one in record.effects(runs, field, 0.0, value):
            counts = f"{one.without} | {one.with_it} | {one.only_without} | {one.only_with} | {one.pairs}"
            lines.append(f"| `{one.arm}` | {what} | {counts} |")
    return lines


def rates_table(runs: pd.DataFrame) -> list[str]:
    """Return how many runs of each arm break at each learning rate, over all settings of the map."""
    rates = sorted(runs.lr.unique())
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm in _arms(runs):
        cells = [runs[(runs.arm == arm) & (runs.lr == rate)].broken for rate in rates]
        lines.append(f"| `{arm}` | " + " | ".join(f"{int(c.sum())} of {len(c)}" for c in cells) + " |")
    return lines


def tables(root: Path, out: Path) -> tuple[str, list[Path]]:
    """Return all tables as Markdown, and draw the figures. A study without results is named.

    Args:
        root: root of the results folders.
        out: folder of the figures.

    Raises:
        FileNotFoundError: the rivals or the map have no runs.
        ValueError: a run is damaged.
    """
    (rivals,) = load_settings(root / "rivals_cpu", partial=True)
    runs = record.table(load_settings(root / "record_cpu", partial=True))
    heads, lengths, sensitive = (_any(root / f"{name}_cpu") for name in ("headline", "length", "sensitivity"))
    ways = root / "trajectories" / "distances.json"
    gaps = measured.gaps(lengths) if lengths else None
    paths = of_ways.load(ways) if ways.is_file() else None
    figures = [record_map(runs, out)]
    figures += [headline.draw(heads, out)] if heads else []
    figures += [] if gaps is None else [length.draw(gaps, out)]
    figures += [] if paths is None else [trajectories.draw(paths, out)]
    parts = (
        (
            "Headline: minus AdamW in nats, paired by seed, each at its best rate; AdamW's row is its loss. Bold: "
            f"differs, p < {headline.ALPHA:g} after Holm's correction over the arms of a column:",
            headline.lines(heads) if heads else _not_run("headline"),
        ),
        (
            "Size and length: minus AdamW in nats, both at their best rates, with 95 % t-intervals over seeds:",
            _not_run("length") if gaps is None else length.lines(gaps),
        ),
        ("Rivals, each at its own best rate (Llama 0.85M, standard library, 400 steps):", rivals_table(rivals)),
        (f"The map: {len(runs)} runs. Runs that break, by learning rate, over all settings:", rates_table(runs)),
        ("The map, paired: the same rate, seed and other setting, with and without:", effect_table(runs)),
        (
            "Sensitivity: largest minus smallest loss over the values, in nats; in brackets minus AdamW's, paired:",
            sensitivity.lines(sensitive_to.table(sensitive)) if sensitive else _not_run("sensitivity"),
        ),
        (
            "Trajectories: distance from AdamW's weights after the last step, divided by the way that AdamW went:",
            ["Not run yet: `python -m experiments.studies.trajectories`."]
            if paths is None
            else trajectories.lines(paths),
        ),
    )
    return "\n\n".join(f"{intro}\n\n" + "\n".join(lines) for intro, lines in parts), figures


def _not_run(study: str) -> list[str]:
    return [f"Not run yet: `python -m experiments.ablation --study {study}`."]


def _any(folder: Path) -> list[Setting]:
    ended = any(state_of(run) in RESULTS for run in folder.glob("*") if (run / "config.json").is_file())
    return load_settings(folder, partial=True) if ended else []


def main(argv: list[str] | None = None) -> None:
    """Draw the figure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced; without it, they go to --out")
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError, OSError):
        setup()
        written, figures = tables(arguments.results, arguments.out)
        if arguments.docs is None:
            (arguments.out / "suite.md").write_text(written + "\n", encoding="utf-8")
        else:
            replace(arguments.docs, written, BEGIN, END)
            illustrate(arguments.docs, figures)
    print(", ".join(map(str, figures)))


if __name__ == "__main__":
    main()
