"""`make figures` from results alone: what it leaves, and that it will not draw a grid with holes in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.ablation import ARMS, load_runs, summary, with_prediction
from paper_figures.ablation import loss_curves, main, tables
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


def test_differences_to_any_arm(tmp_path: Path) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    arms = ["--arms", "elementwise", "adam_mini"]
    main(["--results", str(results), "--out", str(out), *arms, "--against", "adam_mini"])
    ours, other = (out / "tables.md").read_text().split("Paired difference to `adam_mini`")
    assert ours.rstrip().splitlines()[-1] == "| adam_mini | +0.1010 ± 0.0025 | +0.1010 ± 0.0025 |"
    assert other.rstrip().splitlines()[-1] == "| elementwise | -0.1010 ± 0.0025 | -0.1010 ± 0.0025 |"
    with pytest.raises(SystemExit, match="arm=muon"):
        main(["--results", str(results), "--out", str(out), *arms, "muon"])


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


def test_partial_counts_what_it_leaves_out_in_the_table_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    write_run(results, "adam_mini", 0.1, 0, 2.0, state="interrupted")
    main(["--results", str(results), "--out", str(out), "--partial"])
    assert "12 runs (1 interrupted left out)" in capsys.readouterr().out
    assert (out / "tables.md").read_text().startswith("Incomplete: 12 runs; left out: 1 interrupted.")


def test_an_interrupted_run_ends_the_command_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    run = write_run(results, "adam_mini", 0.1, 0, 2.0, state="interrupted")
    with pytest.raises(SystemExit) as ended:
        main(["--results", str(results), "--out", str(out)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and not out.exists()
    assert str(run) in said and "it is interrupted; run `make ablation` again" in said


def test_a_bad_prediction_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    results, out = write_grid(tmp_path / "results"), tmp_path / "out"
    (tmp_path / "cost.json").write_text("[]")
    arguments = ["--results", str(results), "--out", str(out), "--prediction", str(tmp_path / "cost.json"), "--partial"]
    with pytest.raises(SystemExit, match=r"cost\.json is damaged"):
        main(arguments)
    assert not out.exists()


def test_an_arm_is_subtracted_only_where_the_seeds_are_the_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one seed diverged here and another one there, two curves of two seeds were subtracted from each other."""
    for seed in (0, 1, 2):
        for arm, diverged in (("elementwise", 0), ("adam_mini", 1), ("slim_adam", 0)):
            state = "diverged" if seed == diverged else "finished"
            write_run(tmp_path, arm, 0.01, seed, 2.0 + seed, state=state)
    lines = []
    monkeypatch.setattr("paper_figures.ablation.save", lambda figure, *_: lines.extend(figure.axes[1].lines))
    loss_curves(load_runs(tmp_path), tmp_path, "")
    assert [line.get_label() for line in lines if not line.get_label().startswith("_")] == ["slim_adam"]


def test_curves_without_the_baseline_or_with_a_diverged_first_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "results", "adam_mini", 0.01, 0, 2.0, state="diverged", final_val_loss=None)
    (run / "metrics.jsonl").unlink()
    write_run(tmp_path / "results", "adam_mini", 0.01, 1, 2.0)
    assert loss_curves(load_runs(tmp_path / "results"), tmp_path, "").stat().st_size > 1000
