"""Draw the study's figures and write its tables from stored results. Parts without results are left out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from analysis.paper_hessian import PARTS, Results, load
from analysis.paper_hessian.quadratics import with_descent
from paper_figures.commandline import refusals
from paper_figures.pages import illustrate, replace
from paper_figures.paper_hessian import models, quadratics
from paper_figures.style import setup

BEGIN, END = "<!-- tables begin: written by python -m paper_figures.paper_hessian -->", "<!-- tables end -->"
DRAW: dict[str, Callable[[Results, Path], Path]] = {
    "quadratics": quadratics.draw_ends,
    "diagonal_gain": quadratics.draw_gains,
    "one_scalar": quadratics.draw_costs,
    "matrices": quadratics.draw_matrices,
    "classes": models.draw_classes,
    "leave_out": models.draw_left_out,
    "structure": models.draw_structure,
    "spectra": models.draw_spectra,
}
TABLES: dict[str, Callable[[Results], str]] = {
    "quadratics": quadratics.ends_tables,
    "diagonal_gain": quadratics.gains_tables,
    "one_scalar": quadratics.costs_tables,
    "matrices": quadratics.matrix_tables,
    "classes": models.class_tables,
    "leave_out": models.left_out_tables,
    "structure": models.structure_tables,
    "spectra": models.spectra_tables,
}
HEADINGS = {
    "quadratics": "Three blocks",
    "diagonal_gain": "r against tau",
    "one_scalar": "Where one scalar loses",
    "matrices": "Matrices and factored second moments",
    "classes": "Classifiers",
    "leave_out": "Leave-one-out",
    "structure": "Structure",
    "spectra": "Spectra",
}


def present(folder: Path) -> dict[str, Results]:
    """Read the parts that have results.

    Raises:
        FileNotFoundError: none has.
        ValueError: a file is damaged.
    """
    found = {part: load(folder, part) for part in PARTS if (folder / f"{part}.json").is_file()}
    added = found.pop("added_number", None)
    if not found:
        raise FileNotFoundError(f"no results in {folder}; run `make paper-hessian` first")
    if added is not None and "one_scalar" in found:
        found["one_scalar"] = with_descent(found["one_scalar"], added)
    return found


def tables(found: dict[str, Results]) -> str:
    """Return all tables as Markdown, one section per part."""
    sections = []
    for part, results in found.items():
        head = f"### {HEADINGS[part]}: tables\n\n{len(results.cells)} cells."
        sections.append(f"{head}\n\n{TABLES[part](results)}")
    return "\n\n".join(sections)


def main(argv: list[str] | None = None) -> None:
    """Draw the figures and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/paper_hessian"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument(
        "--docs", type=Path, help="page whose tables and figures are replaced; without it, tables go to --out"
    )
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError, OSError):
        found = present(arguments.results)
        arguments.out.mkdir(parents=True, exist_ok=True)
        setup()
        drawn = [DRAW[part](results, arguments.out) for part, results in found.items()]
        written = tables(found)
        if arguments.docs is not None:
            replace(arguments.docs, written, BEGIN, END)
            illustrate(arguments.docs, drawn)
        else:
            (arguments.out / "paper_hessian.md").write_text(written + "\n", encoding="utf-8")
    print(f"{len(found)} of {len(DRAW)} parts; {', '.join(str(path) for path in drawn)}")


if __name__ == "__main__":
    main()
