"""`make figures` from results alone: what it leaves, and that it will not draw a grid with holes in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.ablation import ARMS, load_runs, summary, with_prediction
from paper_figures.ablation import main, tables
from tests.analysis.runs import write_grid, write_run


def test_complete_grid_leaves_figures_and_tables(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    for place, arm in enumerate(ARMS):
        for seed in (0, 1, 2):
            write_run(results, arm, 0.01, seed, 2.0 + seed + 0.1 * place, second_moment_scalars=10 ** (place + 1))
    main(["--results", str(results), "--out", str(out)])
    figures = ("loss_curves", "loss_against_scalars", "learning_rates")
    expected = {f"{name}.{kind}" for name in figures for kind in ("pdf", "png")} | {"tables.md"}
    assert {path.name for path in out.iterdir()} == expected
    assert all(f"| {arm} |" in (out / "tables.md").read_text() for arm in ARMS)


def test_prediction_beside_measurement(tmp_path: Path) -> None:
    results, prediction = write_grid(tmp_path / "results"), tmp_path / "cost.json"
    for arm in ("slim_adam", "derived"):
        write_run(results, arm, 0.01, 0, 3.31 if arm == "slim_adam" else 4.47)
    runs = load_runs(results)
    arms = summary(runs).arm.tolist()
    prediction.write_text(json.dumps({"cost": {arm: float(i) for i, arm in enumerate(arms)}}))
    assert with_prediction(runs, prediction)[1] == pytest.approx(1.0)
    prediction.write_text(json.dumps({"cost": {arm: -float(i) for i, arm in enumerate(arms)}}))
    assert with_prediction(runs, prediction)[1] == pytest.approx(-1.0)
    arguments = [
        "--results",
        str(results),
        "--out",
        str(tmp_path / "out"),
        "--partial",
        "--prediction",
        str(prediction),
    ]
    main(arguments)
    assert (tmp_path / "out" / "predicted_cost.png").stat().st_size > 1000
    prediction.write_text(json.dumps({"cost": {}}))
    with pytest.raises(SystemExit, match="predicts nothing"):
        main(arguments)


def test_a_hole_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    with pytest.raises(SystemExit, match="arm=derived"):
        main(["--results", str(results), "--out", str(out)])
    assert not out.exists()


def test_partial_draws_what_there_is(tmp_path: Path) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    write_run(results, "slim_adam", 0.01, 0, 2.0)
    main(["--results", str(results), "--out", str(out), "--partial"])
    assert (out / "loss_curves.png").stat().st_size > 1000
    row = next(line for line in (out / "tables.md").read_text().splitlines() if line.startswith("| slim_adam"))
    assert "nan" not in row and "| – | – | 1 | 0 |" in row


def test_partial_table_says_missing(tmp_path: Path) -> None:
    runs = load_runs(write_grid(tmp_path))
    hole = runs[~((runs.arm == "adam_mini") & (runs.lr == 0.001))]
    assert tables(hole).splitlines()[-1] == "| adam_mini | missing | +0.1010 ± 0.0025 |"


def test_table_gives_paired_differences(tmp_path: Path) -> None:
    text = tables(load_runs(write_grid(tmp_path)))
    row = next(line for line in text.splitlines() if line.startswith("| adam_mini | 50 | 0.01"))
    assert row.endswith("| +0.1010 ± 0.0025 | yes | 3 | 0 |")


def test_diverged_cells_are_words(tmp_path: Path) -> None:
    write_grid(tmp_path)
    for arm in ("elementwise", "adam_mini"):
        for seed in (0, 1, 2):
            write_run(tmp_path, arm, 0.1, seed, 9.0, state="diverged" if arm == "adam_mini" else "finished")
    row = tables(load_runs(tmp_path)).splitlines()[-1]
    assert row.startswith("| adam_mini |") and row.endswith("| diverged |")


def test_no_results_names_the_next_action(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make ablation"):
        main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
