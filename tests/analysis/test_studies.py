"""Studies of any folder of runs: conditions, pairs, fronts, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis import studies
from analysis.ablation import paired_difference, summary
from tests.analysis.runs import write_grid, write_run


def test_a_plain_grid_is_one_condition_with_the_numbers_of_the_ablation(tmp_path: Path) -> None:
    study = studies.load(write_grid(tmp_path / "grid"))
    assert study.conditions == [""] and study.varied == {} and study.baseline == "elementwise"
    rows = studies.table(study).set_index(["arm", "lr"])
    assert len(rows) == 4
    best, expected = rows.loc["adam_mini", 0.01], summary(study.runs).set_index("arm").loc["adam_mini"]
    assert best.best and (best.loss.mean, best.loss.half) == (expected.loss, expected.loss_half)
    assert best.at_best.mean == expected.difference and best.at_best.n == 3
    assert rows.loc["adam_mini", 0.001].difference == paired_difference(study.runs, "adam_mini", lr=0.001)
    assert rows.loc["elementwise", 0.01].at_best is None and rows.loc["elementwise", 0.01].why == "–"
    assert best.state_bytes == 4200 and rows.loc["elementwise", 0.01].state_bytes == 8000


def test_what_varies_within_an_arm_divides_the_runs(tmp_path: Path) -> None:
    for warmup in (0.1, 0.02):
        for arm, worse in (("elementwise", 0.0), ("adam_mini", 10 * warmup)):
            for seed in (0, 1, 2):
                # The interval of validation follows from the warm-up, and the decay belongs to the arm.
                config = {"warmup": warmup, "model": {"kind": "A", "dim": 8}, "eval_batches": int(100 * warmup)}
                config |= {"weight_decay": 0.1 if arm == "elementwise" else 0.2}
                write_run(tmp_path, arm, 0.01, seed, 2.0 + seed + worse + 0.01 * seed * worse, config)
    study = studies.load(tmp_path)
    assert dict(study.varied) == {"warmup": [0.02, 0.1]}
    assert study.conditions == ["warmup 0.02", "warmup 0.1"] and study.shared["model.dim"] == 8
    rows = studies.table(study).set_index(["condition", "arm"])
    assert rows.loc[("warmup 0.02", "adam_mini")].at_best.mean == pytest.approx(0.202)
    assert rows.loc[("warmup 0.1", "adam_mini")].at_best.mean == pytest.approx(1.01)


def test_sizes_are_named_by_what_is_independent(tmp_path: Path) -> None:
    for dim in (16, 8):
        for steps in (20, 40):
            model = {"kind": "A", "dim": dim, "hidden": 3 * dim}
            every = steps // 2
            run = {"model": model, "steps": steps, "eval_every": every}
            path = write_run(tmp_path, "elementwise", 0.01, 0, 2.0, run)
            lines = (f'{{"step": {step}, "tokens": {step}, "val_loss": 2.0}}\n' for step in (every, steps))
            (path / "metrics.jsonl").write_text("".join(lines))
    study = studies.load(tmp_path)
    # In the order of the fields in the configs; feed-forward width and evaluation follow from others.
    assert study.conditions == ["steps 20, dim 8", "steps 20, dim 16", "steps 40, dim 8", "steps 40, dim 16"]


def test_a_state_that_the_run_counts_itself_is_taken(tmp_path: Path) -> None:
    write_run(tmp_path, "elementwise", 0.01, 0, 2.0, state_bytes=123, second_moment_scalars=0)
    study = studies.load(tmp_path)
    assert study.runs.state_bytes.tolist() == [123] and studies.table(study).state_bytes.tolist() == [123]


def test_arms_with_more_seeds_are_paired_over_those_in_common(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "elementwise", 0.01, seed, 2.0 + seed)
        if seed < 3:
            write_run(tmp_path, "muon", 0.02, seed, 2.5 + seed)
    rows = studies.table(studies.load(tmp_path)).set_index("arm")
    assert rows.at_best["muon"].mean == pytest.approx(0.5) and rows.at_best["muon"].n == 3
    assert rows.difference["muon"] is None and rows.why["muon"] == "no pair"


def test_unfinished_runs_are_counted_and_diverged_ones_kept(tmp_path: Path) -> None:
    write_grid(tmp_path)
    write_run(tmp_path, "elementwise", 0.1, 0, 2.0, state="running")
    write_run(tmp_path, "adam_mini", 0.1, 0, 2.0, state="diverged")
    study = studies.load(tmp_path)
    assert study.left_out == {"running": 1}
    row = studies.table(study).set_index(["arm", "lr"]).loc["adam_mini", 0.1]
    assert row.loss is None and row.diverged == 1 and row.difference is None and row.why == "no pair"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "grid")
    (folder / "holiday").mkdir()
    with pytest.raises(ValueError, match=r"holiday is no training run: it has no config.json; move it"):
        studies.load(folder)
    (folder / "holiday").rmdir()
    run = write_run(folder, "elementwise", 0.1, 0, 2.0)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:30])
    with pytest.raises(ValueError, match=rf"{run.name} is damaged \(metrics.jsonl"):
        studies.load(folder)


def test_folders_with_runs_are_found_by_themselves(tmp_path: Path) -> None:
    write_grid(tmp_path / "new_study")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.json").write_text("{}")
    found, others = studies.folders(tmp_path)
    assert [f.name for f in found] == ["new_study"] and [f.name for f in others] == ["tables"]
    with pytest.raises(FileNotFoundError, match="run `make ablation`"):
        studies.folders(tmp_path / "nowhere")


def test_optimal_points() -> None:
    memory, loss = np.array([1, 2, 2, 3, 4, 0]), np.array([5.0, 3.0, 4.0, 3.0, 1.0, np.inf])
    assert studies.optimal(memory, loss).tolist() == [True, True, False, False, True, False]
    assert studies.optimal(np.array([1, 1]), np.array([2.0, 2.0])).all()


def test_curves_are_means_over_finished_seeds(tmp_path: Path) -> None:
    study = studies.load(write_grid(tmp_path))
    found = studies.curve(study.runs, "elementwise", 0.01)
    assert found is not None and found.n == 3 and found.steps.tolist() == [10, 20]
    assert np.allclose(found.mean, [4.0, 3.0]) and np.allclose(found.high - found.low, 2.0)
    assert studies.curve(study.runs, "elementwise", 7.0) is None
