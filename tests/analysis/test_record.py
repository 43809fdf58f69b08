"""The map of warm-up and clipping: what breaks is counted within a pair, and AdamW sets the bar."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import record
from analysis.settings import load_settings
from paper_figures import headline, suite
from tests.analysis.runs import write_run
from tests.analysis.test_length import write_cells
from tests.analysis.test_sensitivity import write_study
from tests.analysis.test_trajectories import write_ways

SETTINGS = [(w, c) for w in (0.0, 0.1) for c in (0.0, 1.0)]


def write_map(folder: Path) -> Path:
    """AdamW ends at 2.0 or 2.4; adam_mini breaks at the high rate without clipping, and diverges without warm-up."""
    for warmup, clip in SETTINGS:
        setting = {"warmup": warmup, "clip": clip}
        for seed in (0, 1):
            for lr in (0.01, 0.1):
                write_run(folder, "elementwise", lr, seed, 2.0 if lr == 0.01 else 2.4, setting, state_bytes=8)
                high = lr == 0.1 and not clip
                state = "diverged" if lr == 0.1 and not warmup else "finished"
                write_run(folder, "adam_mini", lr, seed, 2.6 if high else 2.1, setting, state=state)
    return folder


def test_a_run_breaks_if_it_diverges_or_ends_far_above_adamw(tmp_path: Path) -> None:
    runs = record.table(load_settings(write_map(tmp_path)))
    assert len(runs) == 32 and record.best(runs) == 2.0
    broken = runs[runs.broken]
    assert set(broken.arm) == {"adam_mini"} and set(broken.lr) == {0.1}
    assert len(broken) == 6  # two settings without warm-up, and one with warm-up but no clipping, two seeds each
    assert runs.diverged.sum() == 4


def test_effects_are_counted_in_pairs(tmp_path: Path) -> None:
    runs = record.table(load_settings(write_map(tmp_path)))
    clipping = {one.arm: one for one in record.effects(runs, "clip", 0.0, 1.0)}
    assert clipping["adam_mini"] == record.Effect("adam_mini", 4, 2, 2, 0, 8)
    assert clipping["elementwise"] == record.Effect("elementwise", 0, 0, 0, 0, 8)
    warmup = {one.arm: one for one in record.effects(runs, "warmup", 0.0, 0.1)}
    assert (warmup["adam_mini"].without, warmup["adam_mini"].with_it, warmup["adam_mini"].only_without) == (4, 2, 2)
    half = runs[~((runs.arm == "adam_mini") & (runs["clip"] == 1.0) & (runs.seed == 1))]
    assert {e.arm: e.pairs for e in record.effects(half, "clip", 0.0, 1.0)}["adam_mini"] == 4


def test_the_grid_has_a_row_for_each_setting(tmp_path: Path) -> None:
    runs = record.table(load_settings(write_map(tmp_path)))
    assert record.rows(runs) == SETTINGS
    loss, broken, number = record.grid(runs, "adam_mini")
    assert number.tolist() == [[2, 2]] * 4 and broken.tolist() == [[0, 2], [0, 2], [0, 2], [0, 0]]
    assert math.isnan(loss[0, 1]) and loss[2, 1] == pytest.approx(2.6)
    missing = record.grid(runs[runs.lr == 0.01], "adam_mini")
    assert np.isfinite(missing[0]).all() and missing[2].shape == (4, 1)


def test_without_adamw_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    settings = load_settings(write_map(tmp_path))
    for setting in settings:
        setting.runs.drop(setting.runs[setting.runs.arm == "elementwise"].index, inplace=True)
    with pytest.raises(ValueError, match="has no runs of elementwise"):
        record.table(settings)


def test_the_page_s_tables_and_figure(tmp_path: Path) -> None:
    write_map(tmp_path / "record_cpu")
    for arm, seeds in (("elementwise", 3), ("lion", 3), ("sgd", 1)):
        for seed in range(seeds):
            write_run(
                tmp_path / "rivals_cpu", arm, 0.01, seed, 1.5 + 0.1 * seed + (arm == "lion"), state_bytes=2_500_000
            )
    page = tmp_path / "suite.md"
    page.write_text(f"before\n{suite.BEGIN}\nSTALE\n{suite.END}\nafter\n")
    suite.main(["--results", str(tmp_path), "--out", str(tmp_path / "out"), "--docs", str(page)])
    text = page.read_text()
    assert "STALE" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| `lion` | 0.01 | yes | 2.6000 | +1.0000 ± 0.0000 | 3 | 0, 0 | 2.50 |" in text
    assert "| `sgd` | 0.01 | yes | 1.5000 | – | 1 | 0, 0 | 2.50 |" in text, "a single pair has no interval"
    assert "| `adam_mini` | 0 of 8 | 6 of 8 |" in text and "| `adam_mini` | clipping | 4 | 2 | 2 | 0 | 8 |" in text
    assert (tmp_path / "figures" / "record_map.png").stat().st_size > 1000
    assert text.count("Not run yet: ") == 4, "headline, length, sensitivity, trajectories"
    write_cells(tmp_path / "length_cpu")
    write_study(tmp_path / "sensitivity_cpu")
    write_ways(tmp_path / "trajectories" / "distances.json")
    suite.main(["--results", str(tmp_path), "--out", str(tmp_path / "out"), "--docs", str(page)])
    assert (
        "| beta2 | 0.95, 0.99 | 0.120, worst at 0.99 | 0.330 (**+0.210 ± 0.025**), worst at 0.99 |" in page.read_text()
    )
    assert "| `lion` | 2.000 ± 0.000 | +1.000 ± 0.000 | 0.500 ± 0.000 | 3 |" in page.read_text()
    assert (tmp_path / "figures" / "trajectories.png").stat().st_size > 1000
    assert page.read_text().count("Not run yet: ") == 1 and "| 0.10M | 160 | 0.01 | +0.0048" in page.read_text()
    assert (tmp_path / "figures" / "length.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no results under"):
        suite.main(["--results", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])


def test_the_headline_has_a_column_per_place_and_marks_what_differs(tmp_path: Path) -> None:
    for kind, data in (("GPTConfig", "enwik8"), ("LlamaConfig", "stdlib")):
        setting = {"model": {"kind": kind}, "data": data}
        for seed in range(10):
            write_run(tmp_path, "elementwise", 0.01, seed, 2.0 + 0.1 * seed, setting)
            sign = 1 if kind == "GPTConfig" or seed % 2 else -1
            write_run(tmp_path, "lion", 0.01, seed, 2.0 + 0.1 * seed + sign * 0.01 * (1 + seed % 3), setting)
        state = "diverged" if kind == "GPTConfig" else "finished"
        write_run(tmp_path, "sgd", 0.01, 0, 2.5, setting, state=state)
    lines = headline.lines(load_settings(tmp_path))
    assert lines[0] == "| arm | GPT, enwik8 | Llama, stdlib |"
    rows = {line.split("`")[1]: line for line in lines[2:]}
    assert list(rows) == ["elementwise", "lion", "sgd"]
    assert "2.4500, at 0.01 (edge)" in rows["elementwise"]
    assert re.search(r"\| \*\*\+0\.0190 ± [0-9.]+\*\*, n = 10.*\| -0\.0010 ± ", rows["lion"]), rows["lion"]
    assert "1 diverged" in rows["sgd"] and "n = 1" in rows["sgd"]


def test_the_figure_of_the_headline_shows_differences_and_fills_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = {"model": {"kind": "GPTConfig"}, "data": "enwik8"}
    for seed in range(10):
        for arm, gap in (("elementwise", 0.0), ("lion", 0.01 * (1 + seed % 3)), ("came", 0.01 * (-1) ** seed)):
            write_run(tmp_path, arm, 0.01, seed, 2.0 + 0.1 * seed + gap, setting)
    write_run(tmp_path, "sgd", 0.01, 0, 2.5, setting)  # one seed has no interval, so no point
    drawn: list[Figure] = []
    monkeypatch.setattr(headline, "save", lambda figure, out, name: drawn.append(figure) or out / name)
    assert headline.draw(load_settings(tmp_path), tmp_path).name == "headline"
    (axes,) = drawn[0].axes
    points = {line.get_ydata()[0]: line for line in axes.lines if line.get_marker() == "o"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["came", "lion", "sgd"]
    assert sorted(points) == [0, 1] and axes.get_title() == "GPT, enwik8, n = 10"
    assert float(points[1].get_xdata()[0]) == pytest.approx(0.019) and points[1].get_markerfacecolor() != "white"
    assert float(points[0].get_xdata()[0]) == pytest.approx(0.0) and points[0].get_markerfacecolor() == "white"


def test_what_differs_is_corrected_for_the_number_of_arms(tmp_path: Path) -> None:
    """Seven equal signs have p = 0.016; four arms make that 0.06."""
    setting = {"model": {"kind": "GPTConfig"}, "data": "enwik8"}
    for number, arms in enumerate((("lion",), ("lion", "sgd", "muon", "came"))):
        folder = tmp_path / str(number)
        for seed in range(7):
            for arm in ("elementwise", *arms):
                worse = 0.01 * (1 + seed % 3) * (arm != "elementwise")
                write_run(folder, arm, 0.01, seed, 2.0 + 0.1 * seed + worse, setting)
        lines = headline.lines(load_settings(folder))
        assert ("**" in "".join(lines)) == (len(arms) == 1)
