"""The role study's figure and tables from results alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import role_study
from paper_figures.role_study import BEGIN, END, additivity_table, gap_table, main, regret_table, set_table
from tests.analysis.role_results import write_study

ROOT = Path(__file__).resolve().parents[2]


def test_figure_and_tables_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_study.correlations, "__defaults__", (20, 0))
    folder, page = write_study(tmp_path / "results"), tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--results", str(folder), "--out", str(tmp_path / "out"), "--docs", str(page)]
    main(arguments)
    text = page.read_text()
    assert text.startswith(f"# Before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "**`good`** (winner)" in text and "`scalars` (blind)" in text
    assert "| Llama, standard library, lr 0.003 | adam_mini |" in text and "| KEY/ATTENTION_HEAD |" in text
    assert (tmp_path / "out" / "role_study.png").stat().st_size > 10_000
    main(arguments)
    assert page.read_text() == text, "writing again changes nothing"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the lines"):
        main(arguments)


def test_the_tables_of_the_page_are_those_of_the_runs() -> None:
    """The tables without a bootstrap, which takes seconds, and the winner."""
    study, page = role_study.load(ROOT / "results" / "role_study"), (ROOT / "docs" / "role_study.md").read_text()
    rows = [*gap_table(study), *additivity_table(study), *set_table(study), *regret_table(study)]
    assert len(rows) > 60 and [row for row in rows if row not in page] == []
    assert f"**`{role_study.winner(study)[0]}`** (winner)" in page and f"{study.runs} runs." in page
