"""Write the site of the committed results: ``make report``, or ``python -m paper_figures.report --out out/report``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import hessian_maps, real_model, rules, studies
from analysis import workloads as measured
from paper_figures.commandline import refusals
from paper_figures.report import headline, maps, reproduction, site, structure, training, workloads
from paper_figures.report import rules as rule_sets

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("hessian_maps", "paper_hessian", "real_model")
"""Folders of results other than training runs that the site reads."""
MOST_BYTES = 15_000_000


@dataclass(frozen=True)
class Sources:
    """Where the site's contents come from.

    Attributes:
        results: root of the results.
        rules: folder of the shipped rule sets.
        reproduction: page with the tables of claims and commands.
    """

    results: Path = ROOT / "results"
    rules: Path = ROOT / "optimizer" / "partition" / "rules"
    reproduction: Path = ROOT / "docs" / "reproduction.md"


def build(sources: Sources, out: Path) -> int:
    """Write the site.

    Returns:
        Its size in bytes.

    Raises:
        FileNotFoundError: a result, the rules or the page is missing.
        ValueError: one is damaged, or the site would be larger than ``MOST_BYTES``.
    """
    folders, others = studies.folders(sources.results)
    found = [studies.load(folder) for folder in folders]
    answers = headline.answers(sources.results)
    sets = rules.load(sources.rules)
    again = reproduction.load(sources.reproduction)
    tiny, real = hessian_maps.load(sources.results / "hessian_maps"), real_model.load(sources.results / "real_model")
    along = structure.pictures(sources.results / "paper_hessian")
    tasks = measured.load(sources.results, required=False)
    # Everything is read before the first figure is made, so that what is missing is known at once.
    pictures = {
        "headline": headline.picture(answers),
        "differences": training.differences(found),
        "pareto": training.pareto(found),
        "curves": training.curves(found),
        "maps": maps.pictures(tiny, real),
        "structure": along,
        "evidence": rule_sets.evidence(sets),
        "samples": workloads.images(tasks),
    }
    page = site.render(
        "report.html.j2",
        answer=headline.sentence(answers),
        cards=headline.cards(answers),
        seeds=headline.seeds(answers),
        sections=training.sections(found),
        units=rule_sets.units_table(sets),
        candidates=rule_sets.evidence_table(sets),
        trained=rule_sets.trained_table(sets),
        reproduction=again,
        unmeasured=rule_sets.unmeasured(sets),
        structure_command=structure.COMMAND,
        tasks=workloads.table(tasks),
        answers=workloads.answers_table(workloads.answers(tasks)),
        workloads_command=workloads.COMMAND,
        others=[folder.name for folder in others if folder.name not in SHOWN],
        count=sum(len(study.runs) for study in found),
        **pictures,
    )
    size = site.write(out, page, [each for each in pictures.values() if each is not None])
    if size > MOST_BYTES:
        raise ValueError(f"{out} has {size:,} bytes, more than {MOST_BYTES:,}; store fewer maps or fewer curves")
    return size


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Results that are missing or damaged end it with one line and exit code 2."""
    default = Sources()
    parser = argparse.ArgumentParser(prog="python -m paper_figures.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=default.results)
    parser.add_argument("--rules", type=Path, default=default.rules)
    parser.add_argument("--reproduction", type=Path, default=default.reproduction)
    parser.add_argument("--out", type=Path, default=Path("out/report"))
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with refusals(FileNotFoundError, ValueError, OSError):
        size = build(Sources(arguments.results, arguments.rules, arguments.reproduction), arguments.out)
    print(f"{size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s; open {arguments.out / 'index.html'}")


if __name__ == "__main__":
    main()
