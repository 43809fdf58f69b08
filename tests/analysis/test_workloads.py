"""Workloads: arms at their best rates with everything that was measured, and what runs left to look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis import workloads
from tests.analysis.runs import write_run


def write_workload(root: Path, name: str = "resnet", worse: float = 0.1) -> Path:
    """adam_mini is worse at every seed, derived as good on average; accuracies follow the loss."""
    folder = root / f"{name}_cpu"
    for arm, shifts in (("elementwise", (0, 0, 0)), ("adam_mini", (1.0, 1.1, 0.9)), ("derived", (-1, 0.1, 1))):
        for seed, shift in enumerate(shifts):
            for lr in (0.001, 0.01) if seed == 0 else (0.01,):
                loss = 1.0 + 0.1 * seed + worse * shift + (lr == 0.001)
                run = write_run(folder, arm, lr, seed, loss, state_bytes=8)
                points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                lines = [{**point, "accuracy": 1 - loss / 10 - (20 - point["step"])} for point in points]
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                (run / "samples.json").write_text(json.dumps({"of": [arm, lr, seed]}))
    return folder


def test_arms_are_compared_at_their_best_rates_with_their_metrics(tmp_path: Path) -> None:
    write_workload(tmp_path)
    (found,) = workloads.load(tmp_path)
    assert found.name == "resnet" and found.metrics == ["accuracy"]
    rows = {row.comparison.arm: row for row in found.rows}
    assert rows["elementwise"].metrics["accuracy"].mean == pytest.approx(1 - 1.1 / 10)
    assert rows["elementwise"].metrics["accuracy"].n == 3
    assert {arm: workloads.differs(row) for arm, row in rows.items()} == {
        "elementwise": "–", "adam_mini": "worse", "derived": "no"
    }  # fmt: skip
    steps, losses = workloads.curves(found)["adam_mini"]
    assert steps.tolist() == [10, 20] and losses[-1] == pytest.approx(1.2)


def test_what_a_run_left_is_that_of_the_best_rate(tmp_path: Path) -> None:
    write_workload(tmp_path)
    (found,) = workloads.load(tmp_path)
    assert workloads.shown(found) == {"samples": {"of": ["elementwise", 0.01, 0]}}
    assert workloads.shown(found, "derived", 2) == {"samples": {"of": ["derived", 0.01, 2]}}
    assert workloads.shown(found, "nothing") == {}


def test_better_single_and_missing_are_said(tmp_path: Path) -> None:
    folder = write_workload(tmp_path, worse=-0.1)
    write_run(folder, "sgd", 0.01, 0, 3.0, state_bytes=8)
    write_run(folder, "lion", 0.01, 0, 3.0, state_bytes=8, state="diverged")
    rows = {row.comparison.arm: workloads.differs(row) for row in workloads.load(tmp_path)[0].rows}
    assert (rows["adam_mini"], rows["sgd"], rows["lion"]) == ("better", "n = 1", "diverged")
    with pytest.raises(FileNotFoundError, match="run `make workloads PROFILE=smoke`"):
        workloads.load(tmp_path, "smoke")


def test_two_settings_are_refused(tmp_path: Path) -> None:
    folder = write_workload(tmp_path)
    write_run(folder, "elementwise", 0.01, 7, 1.0, {"batch": 7})
    with pytest.raises(ValueError, match="mixes 2 settings"):
        workloads.load(tmp_path)


def test_a_workload_that_has_only_begun_is_left_out(tmp_path: Path) -> None:
    write_workload(tmp_path)
    write_run(tmp_path / "vit_cpu", "elementwise", 0.01, 0, 1.0, state="failed")
    assert [one.name for one in workloads.load(tmp_path)] == ["resnet"]
