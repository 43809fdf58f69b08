"""Size and length: gaps pair by seed at each arm's best rate, and a plane that is there is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis import length
from analysis.settings import load_settings
from paper_figures import length as drawn
from tests.analysis.runs import write_run

A, B, C = 0.05, -0.004, 0.01
CELLS = [(1e5, 1), (1e5, 20), (1e5, 160), (1e6, 1), (1e6, 20)]


def write_cells(folder: Path, noise: float = 0.0, skip: str = "") -> Path:
    """The gap is a plane in log size and log length, plus noise of a seed."""
    for parameters, ratio in CELLS:
        setting = {"batch": int(parameters * ratio / 20), "seq_len": 1, "model": {"dim": parameters}}
        plane = A + B * np.log2(ratio / 20) + C * np.log2(parameters / 1e6)
        for seed in (0, 1, 2):
            base = 2.0 + 0.1 * seed
            for lr, worse in ((0.01, 0.0), (0.1, 0.3)):
                if seed == 0 or not worse:
                    losses = {"elementwise": base + worse, "adam_mini": base + worse + plane + noise * seed}
                    for arm in losses.keys() - {skip}:
                        write_run(folder, arm, lr, seed, losses[arm], setting, parameters=int(parameters))
    return folder


def test_a_plane_is_found_with_its_spread_over_seeds(tmp_path: Path) -> None:
    table = length.gaps(load_settings(write_cells(tmp_path, noise=0.002)))
    assert len(table) == len(CELLS) * 3 and set(table.lr) == {0.01}
    assert sorted(set(table.ratio)) == [1, 20, 160]
    fit = length.fit(table, "adam_mini")
    assert fit.a.mean == pytest.approx(A + 0.002) and fit.a.half > 0
    assert (fit.b.mean, fit.c.mean) == (pytest.approx(B), pytest.approx(C))
    assert fit.seeds == 3 and fit.left_out == 0 and fit.residual == pytest.approx(0, abs=1e-9)
    cell = length.cells(table, "adam_mini")[0]
    assert cell.gap is not None and cell.gap.n == 3
    assert cell.gap.mean == pytest.approx(A + B * np.log2(1 / 20) + C * np.log2(0.1) + 0.002)


def test_a_diverged_cell_is_named_and_not_fitted(tmp_path: Path) -> None:
    write_cells(tmp_path)
    setting = {"batch": 9_000, "seq_len": 1, "model": {"dim": 7}}
    write_run(tmp_path, "elementwise", 0.01, 0, 2.0, setting, parameters=50_000)
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, setting, parameters=50_000, state="diverged")
    table = length.gaps(load_settings(tmp_path))
    assert length.fit(table, "adam_mini").left_out == 1
    assert "diverged" in "\n".join(drawn.lines(table))


def test_the_page_has_every_cell(tmp_path: Path) -> None:
    table = length.gaps(load_settings(write_cells(tmp_path / "runs")))
    text = drawn.lines(table)
    assert len(text) == 2 + len(CELLS) + 3 + 1 and text[2].startswith("| 0.10M | 1 | 0.01 | ")
    assert drawn.draw(table, tmp_path).is_file()


def test_too_few_cells_and_a_missing_baseline_are_named(tmp_path: Path) -> None:
    table = length.gaps(load_settings(write_cells(tmp_path / "a")))
    with pytest.raises(ValueError, match="3 complete cells, too few to fit size and length"):
        length.fit(table[table.parameters == 1e5], "adam_mini")
    with pytest.raises(ValueError, match="has no runs of elementwise"):
        length.gaps(load_settings(write_cells(tmp_path / "b", skip="elementwise")))
