"""The page of the workloads: every arm has a row, and the figure a panel per workload."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import workloads
from paper_figures import workloads as page_of
from tests.analysis.test_workloads import write_workload


def test_the_page_has_a_table_and_a_panel_per_workload(tmp_path: Path) -> None:
    for name in ("resnet", "vit", "gcn", "sft", "reward"):
        write_workload(tmp_path, name)
    page = tmp_path / "workloads.md"
    page.write_text(f"before\n{page_of.BEGIN}\nSTALE\n{page_of.END}\nafter\n")
    page_of.main(["--results", str(tmp_path), "--out", str(tmp_path / "out"), "--docs", str(page)])
    text = page.read_text()
    assert "STALE" not in text and [line for line in text.splitlines() if line.startswith("### ")] == [
        "### sft", "### reward", "### resnet", "### vit", "### gcn"
    ]  # fmt: skip
    assert "Not run yet: `gpt2`, `llama`, `sft_lora`" in text and 'ONLY="gpt2 llama sft_lora remax' in text
    row = "| `adam_mini` | 0.01 (end of the grid) | 1.2000 | +0.1000 ± 0.0248, n = 3 | worse | 0.8800 ± 0.0"
    assert row in text, text
    assert (tmp_path / "figures" / "workloads.png").stat().st_size > 10_000
    figure = page_of.draw(workloads.load(tmp_path), tmp_path / "out")
    assert figure.is_file()


def test_without_results_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `make workloads PROFILE=cpu`"):
        page_of.main(["--results", str(tmp_path)])
