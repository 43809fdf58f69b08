"""The study of few-bit moments: what it reads back, and that its rule counts every seed. No run is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.studies.low_bit_moments import stability
from experiments.studies.low_bit_moments.__main__ import STAGES, compare, stored, verdict
from experiments.studies.low_bit_moments.candidates import QUIETER

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2, 3)


def a_run(arm: str, seed: int, loss: float | None, steps: int = 10, lr: float = 3e-3) -> dict[str, Any]:
    last = float("nan") if loss is None else loss
    return {"arm": arm, "seed": seed, "steps": steps, "lr": lr, "final_val_loss": loss,
            "curve": [[5, 3.0], [steps, last]], "seconds": 1.0}  # fmt: skip


def some(seeds: tuple[int, ...], arm: str = "int8") -> list[dict[str, Any]]:
    shift = (1e-3, -1e-3, 1e-3, -1e-3)
    return [run for s in seeds for run in (a_run("fp32", s, 2.0), a_run(arm, s, 2.0 + shift[s]))]


def test_an_unfinished_study_passes_nothing() -> None:
    """The rule counts all seeds: with half of them an interrupted study said that a format passes."""
    whole, half = (compare(some(seeds), "int8", SEEDS) for seeds in (SEEDS, SEEDS[:2]))
    assert whole["passes"] and verdict(whole) == "passes"
    assert not half["passes"] and half["n"] == 2 and verdict(half) == "no verdict: 2 of 4 seeds"


def test_a_seed_of_another_stage_is_no_substitute() -> None:
    runs = [*some(SEEDS[:3]), a_run("fp32", 9, 2.0), a_run("int8", 9, 2.0)]
    assert not compare(runs, "int8", SEEDS)["passes"]


def test_a_diverged_run_fails_whichever_of_the_pair_it_is() -> None:
    for arm in ("int8", "fp32"):
        runs = [r if (r["arm"], r["seed"]) != (arm, 1) else a_run(arm, 1, None) for r in some(SEEDS)]
        row = compare(runs, "int8", SEEDS)
        assert not row["passes"] and verdict(row) == "diverged: fails"


def test_an_arm_without_a_pair_has_no_difference() -> None:
    row = compare([a_run("int8", 0, 2.0)], "int8", SEEDS)
    assert "mean_difference" not in row and verdict(row) == "no verdict: 0 of 4 seeds"


@pytest.mark.parametrize("name", ["screen", "final"])
def test_the_committed_results_are_whole(name: str) -> None:
    _, _, steps, lr = STAGES[name]
    assert stored(ROOT / "results" / "low_bit" / f"{name}.json", steps, lr)["runs"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (None, "has no runs"),
        ([[]], "a run without one of its keys"),
        ([{"arm": "int8", "seed": 0}], "a run without one of its keys"),
        ([a_run("int8", 0, 2.0), a_run("int8", 0, 2.0)], "arm=int8 seed=0 is there twice"),
        ([a_run("int8", 0, 2.0, steps=20)], "steps=20 at lr=0.003, not 10 at 0.003"),
        ([a_run("int8", 0, 2.0, lr=1e-2)], "at lr=0.01, not 10 at 0.003"),
        ([{**a_run("int8", 0, 2.0), "final_val_loss": None}], "final_val_loss=None, which its curve does not end"),
        ([{**a_run("int8", 0, 2.0), "final_val_loss": 1.0}], "final_val_loss=1.0, which its curve does not end"),
        ([{**a_run("int8", 0, 2.0), "curve": [[5, 3.0]]}], "final_val_loss=2.0, which its curve does not end"),
        ([{**a_run("int8", 0, 2.0), "curve": []}], "final_val_loss=2.0, which its curve does not end"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, runs: Any, message: str) -> None:
    path = tmp_path / "final.json"
    path.write_text(json.dumps({"runs": runs}))
    with pytest.raises(ValueError, match=rf"final\.json.*{message}.*move the file away"):
        stored(path, 10, 3e-3)


@pytest.mark.parametrize("text", ["[]", "0", "{}"])
def test_a_file_that_is_not_the_studys_is_not_written_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "final.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="has no runs"):
        stored(path, 10, 3e-3)


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "final.json"
    assert stored(path, 10, 3e-3)["runs"] == []
    path.write_text(json.dumps({"runs": [a_run("int8", 0, None)]}))
    assert len(stored(path, 10, 3e-3)["runs"]) == 1


def test_only_rotating_numbers_lose_moments_without_gradients() -> None:
    rows = json.loads((ROOT / "results/low_bit/stability.json").read_text())["quieter"]
    kept = {row["arm"]: row["kept"] for row in rows}
    assert {arm.name: stability.kept(arm) for arm in QUIETER} == pytest.approx(kept, abs=0.002)
    assert [name for name, share in kept.items() if abs(share - 1) > 0.02] == ["int4-square-rotated-32-bf16"]
