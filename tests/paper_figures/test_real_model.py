"""The real model's figures and tables from stored results alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import real_model
from paper_figures.real_model import BEGIN, END, main
from paper_figures.real_model_tables import interval, number, short, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "real_model"


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    written, page = tables(real_model.load(RESULTS)), (ROOT / "docs" / "real_model.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and [row for row in rows if row not in page] == []
    assert page.split(BEGIN)[1].split(END)[0].strip() == written


def test_figures_and_page_are_written_from_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nwhat was there\n{END}\nafter\n")
    main(["--results", str(RESULTS), "--out", str(tmp_path / "out"), "--docs", str(page)])
    assert page.read_text().startswith(f"# Before\n{BEGIN}\n") and "what was there" not in page.read_text()
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"real_model_{name}.png" for name in ("energy", "gaps", "maps", "spectra")]


def test_missing_results_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "make real-model" in capsys.readouterr().err


def test_results_are_small() -> None:
    assert sum(path.stat().st_size for path in RESULTS.glob("*.json")) < 5_000_000


def test_numbers_have_the_digits_of_their_error() -> None:
    assert number(real_model.Number(0.24123, 0.0123, 5)) == "0.241 ± 0.012"
    assert number(real_model.Number(2.1e-5, 3.4e-6, 5)) == "2.1e-05 ± 3e-06"
    assert interval(real_model.Number(1.0, 0.1, 3)) == "0.682 to 1.32"
    assert short("model.layers.29.self_attn.q_proj.weight[head 0]") == "layers.29.self_attn.q_proj[head 0]"
