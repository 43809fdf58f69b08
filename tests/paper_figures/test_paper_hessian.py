"""The tables of docs/paper_hessian.md are those of the committed results, and a page keeps its other text."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.paper_hessian import PARTS, load
from paper_figures.pages import illustrate, replace
from paper_figures.paper_hessian import models, quadratics
from paper_figures.paper_hessian.__main__ import BEGIN, DRAW, END, HEADINGS, TABLES, main, present

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "results" / "paper_hessian", ROOT / "docs" / "paper_hessian.md"
QUICK = {
    "quadratics": quadratics.ends_tables,
    "matrices": quadratics.matrix_tables,
    "classes": models.class_tables,
    "leave_out": models.left_out_tables,
    "structure": models.structure_tables,
    "spectra": models.spectra_tables,
}
"""The tables without a long bootstrap."""


@pytest.mark.parametrize("part", [part for part in QUICK if (RESULTS / f"{part}.json").is_file()])
def test_the_tables_of_the_page_are_those_of_the_results(part: str) -> None:
    text, page = QUICK[part](load(RESULTS, part)), PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 3 and [row for row in rows if row not in page] == []


def test_every_part_has_a_figure_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(DRAW) == list(TABLES) == list(HEADINGS) == [part for part in PARTS if part != "added_number"]
    assert "classes" in present(RESULTS)
    with pytest.raises(SystemExit, match="no results in"):
        main(["--results", str(tmp_path)])
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"classes\.json has format_version=None"):
        main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])


def test_replacing_the_tables_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace(page, "new", BEGIN, END)
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    figure = tmp_path / "elsewhere" / "plot.png"
    figure.parent.mkdir()
    figure.write_bytes(b"png")
    illustrate(page, [figure])
    assert (tmp_path / "figures" / "plot.png").read_bytes() == b"png"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the lines"):
        replace(page, "new", BEGIN, END)
