"""The ablation's tables: pairing within a seed, and every kind of missing or foreign run refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.__main__ import overview
from analysis.ablation import (
    at_best,
    best_rates,
    load_runs,
    paired_difference,
    require_complete,
    summary,
    with_prediction,
)
from tests.analysis.runs import ARMS, write_grid, write_run


def test_differences_are_taken_within_a_seed(tmp_path: Path) -> None:
    runs = load_runs(write_grid(tmp_path))
    assert len(runs) == 12
    assert best_rates(runs) == {"elementwise": 0.01, "adam_mini": 0.01}
    interval = paired_difference(runs, "adam_mini")
    assert interval is not None
    # Losses spread by 1 over seeds; only pairing can see a difference of 0.1.
    assert interval.mean == pytest.approx(0.101)
    assert interval.half < 0.01
    assert interval.excludes_zero


def test_summary_is_best_first_with_scalars(tmp_path: Path) -> None:
    table = summary(load_runs(write_grid(tmp_path)))
    assert table.arm.tolist() == ["elementwise", "adam_mini"]
    assert table.scalars.tolist() == [1000, 50]
    assert table.n.tolist() == [3, 3]
    assert table.differs.tolist() == [False, True]


def test_a_complete_grid_passes_and_a_hole_is_named(tmp_path: Path) -> None:
    runs = load_runs(write_grid(tmp_path))
    require_complete(runs, tuple(ARMS))
    hole = runs[~((runs.arm == "adam_mini") & (runs.lr == 0.01) & (runs.seed == 1))]
    with pytest.raises(ValueError, match=r"1 runs are missing: arm=adam_mini lr=0.01 seed=1"):
        require_complete(hole, tuple(ARMS))


def test_a_whole_arm_can_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arm=derived"):
        require_complete(load_runs(write_grid(tmp_path)), (*ARMS, "derived"))


def test_a_diverged_run_loses_and_is_counted(tmp_path: Path) -> None:
    write_grid(tmp_path)
    for seed in (0, 1, 2):
        write_run(tmp_path, "elementwise", 0.1, seed, 1.0)
        write_run(tmp_path, "adam_mini", 0.1, seed, 1.0, state="diverged" if seed == 0 else "finished")
    runs = load_runs(tmp_path)
    assert best_rates(runs) == {"elementwise": 0.1, "adam_mini": 0.01}
    assert paired_difference(runs, "adam_mini", lr=0.1) is None
    assert set(at_best(runs).groupby("arm").lr.first()) == {0.1, 0.01}


def test_an_arm_that_always_diverges_stays_in_the_table(tmp_path: Path) -> None:
    write_grid(tmp_path)
    for seed in (0, 1, 2):
        write_run(tmp_path, "pytorch_default", 0.01, seed, 1.0, state="diverged")
    last = summary(load_runs(tmp_path)).iloc[-1]
    assert (last.arm, last.loss, last.diverged, bool(last.differs)) == ("pytorch_default", float("inf"), 3, False)


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make ablation"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"state": "failed"}, "failed"),
        ({"format_version": 99}, "format_version=99"),
    ],
)
def test_refused_runs_are_named(tmp_path: Path, damage: dict[str, object], message: str) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, **damage)
    with pytest.raises(ValueError, match=message) as error:
        load_runs(tmp_path)
    assert run.name in str(error.value)


def test_unfinished_is_refused_unless_partial(tmp_path: Path) -> None:
    write_run(tmp_path, "elementwise", 0.01, 0, 2.0)
    (write_run(tmp_path, "adam_mini", 0.01, 0, 2.0) / "status.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        load_runs(tmp_path)
    assert load_runs(tmp_path, partial=True).arm.tolist() == ["elementwise"]


@pytest.mark.parametrize("state", ["interrupted", "running", "failed", "queued"])
def test_only_finished_and_diverged_runs_are_results(tmp_path: Path, state: str) -> None:
    write_run(tmp_path, "elementwise", 0.01, 0, 2.0)
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, state=state)
    with pytest.raises(ValueError, match=f"{run.name}.*{state}.*make ablation"):
        load_runs(tmp_path)
    runs = load_runs(tmp_path, partial=True)
    assert runs.arm.tolist() == ["elementwise"]
    assert runs.attrs["left_out"] == {state: 1}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("text", [None, "", '{"step": 10, "tokens": 640, "val_loss": 2.1}\n', '{"step": 1'])
def test_a_finished_run_without_its_whole_curve_is_damaged(tmp_path: Path, text: str | None, partial: bool) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    (run / "metrics.jsonl").unlink()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"{run.name} is damaged.*delete the folder"):
        load_runs(tmp_path, partial=partial)


@pytest.mark.parametrize("loss", [None, float("nan"), "2.0"])
def test_a_finished_run_without_a_loss_is_damaged(tmp_path: Path, loss: object) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, final_val_loss=loss)
    with pytest.raises(ValueError, match="final_val_loss="):
        load_runs(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"state": 1}', '{"sta', "null"])
def test_a_status_that_names_no_state_is_damaged(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    (run / "status.json").write_text(text)
    with pytest.raises(ValueError, match=f"{run.name} is damaged"):
        load_runs(tmp_path)


def test_a_run_that_diverged_before_its_first_point_is_a_result(tmp_path: Path) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, state="diverged", final_val_loss=None)
    (run / "metrics.jsonl").unlink()
    assert load_runs(tmp_path).final_val_loss.tolist() == [float("inf")]


def test_cut_file_is_damaged_not_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    (run / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match="damaged"):
        load_runs(tmp_path)


def test_the_same_row_twice_is_refused(tmp_path: Path) -> None:
    for steps in (20, 30):
        write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, {"steps": steps}, state="diverged")
    with pytest.raises(ValueError, match=r"several runs of .*adam_mini.*remove one"):
        load_runs(tmp_path)


@pytest.mark.parametrize("partial", [False, True])
def test_a_folder_that_is_not_its_configs_is_damaged(tmp_path: Path, partial: bool) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    write_run(tmp_path, "adam_mini", 0.01, 1, 2.0).rename(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"copy is damaged.*not the folder's name.*delete the folder and run"):
        load_runs(tmp_path, partial=partial)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("name", ["config.json", "environment.json"])
@pytest.mark.parametrize("text", [None, "", "[]", '{"arm": "a", "arm": "b"}'])
def test_a_result_without_one_of_its_files_is_damaged(
    tmp_path: Path, name: str, text: str | None, partial: bool
) -> None:
    """A folder without a config was not even looked at, so a run was missing without a word."""
    write_run(tmp_path, "elementwise", 0.01, 0, 2.0)
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{run.name} is damaged \(.*{name}.*delete the folder"):
        load_runs(tmp_path, partial=partial)


@pytest.mark.parametrize(
    "points",
    [[20], [10, 10, 20], [10, 20, 30], [20, 10]],
    ids=["a point lost", "one twice", "one too many", "out of order"],
)
def test_a_curve_has_every_point_once(tmp_path: Path, points: list[int]) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    by_step = {10: lines[0], 20: lines[1], 30: lines[1].replace("20", "30")}
    (run / "metrics.jsonl").write_text("".join(by_step[step] + "\n" for step in points))
    with pytest.raises(ValueError, match=rf"{run.name} is damaged \(metrics.jsonl"):
        load_runs(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"2.0"', "true"])
def test_a_point_of_a_finished_curve_is_a_number(tmp_path: Path, value: str) -> None:
    run = write_run(tmp_path, "adam_mini", 0.01, 0, 2.0)
    _, last = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f'{{"step": 10, "tokens": 640, "val_loss": {value}}}\n{last}\n')
    with pytest.raises(ValueError, match=f"{run.name} is damaged .val_loss=.*of step 10"):
        load_runs(tmp_path)


def test_the_final_loss_is_the_curves_last(tmp_path: Path) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, final_val_loss=1.9)
    with pytest.raises(ValueError, match=r"final_val_loss=1\.9 .*is not the 2\.0 of its curve"):
        load_runs(tmp_path)


@pytest.mark.parametrize("key", ["parameters", "second_moment_scalars"])
@pytest.mark.parametrize("count", [None, "7", 0, True, 1.5])
def test_counts_are_counts(tmp_path: Path, key: str, count: object) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, **{key: count})
    with pytest.raises(ValueError, match=f"{key}="):
        load_runs(tmp_path)


def test_an_optimizer_without_second_moments_is_an_arm(tmp_path: Path) -> None:
    write_run(tmp_path, "sgd", 0.1, 0, 2.0, second_moment_scalars=0, state_bytes=4000)
    write_run(tmp_path, "elementwise", 0.1, 0, 2.0)
    runs = load_runs(tmp_path).set_index("arm")
    assert runs.second_moment_scalars.to_dict() == {"sgd": 0, "elementwise": 1000}
    assert runs.state_bytes["sgd"] == 4000 and runs.state_bytes.isna()["elementwise"]
    assert "sgd" in overview(load_runs(tmp_path)) and summary(load_runs(tmp_path)).scalars.min() == 0


@pytest.mark.parametrize("count", [None, "7", -1, True, 1.5])
def test_bytes_are_bytes(tmp_path: Path, count: object) -> None:
    write_run(tmp_path, "sgd", 0.1, 0, 2.0, second_moment_scalars=0, state_bytes=count)
    with pytest.raises(ValueError, match="state_bytes="):
        load_runs(tmp_path)


def test_two_experiments_in_one_folder_are_refused(tmp_path: Path) -> None:
    """No mean may be taken over runs of different lengths or models."""
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, {"batch": 16})
    write_run(tmp_path, "adam_mini", 0.01, 1, 2.0, {"batch": 32})
    with pytest.raises(ValueError, match=r"mixes two experiments.*batch="):
        load_runs(tmp_path)


def test_rules_differ_between_arms_and_never_within_one(tmp_path: Path) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, {"rules_hash": "a"})
    write_run(tmp_path, "derived", 0.01, 0, 2.0, {"rules_hash": "b"})
    assert len(load_runs(tmp_path)) == 2
    write_run(tmp_path, "derived", 0.01, 1, 2.0, {"rules_hash": "c"})
    with pytest.raises(ValueError, match=r"mixes two experiments.*rules_hash="):
        load_runs(tmp_path)


def test_with_nothing_but_interrupted_runs_there_are_no_results(tmp_path: Path) -> None:
    write_run(tmp_path, "adam_mini", 0.01, 0, 2.0, state="interrupted")
    with pytest.raises(FileNotFoundError, match=r"no results.*1 interrupted left out.*make ablation"):
        load_runs(tmp_path, partial=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cost": [1]}', '{"cost": {"adam_mini": NaN, "elementwise": 0}}',
                                  '{"cost": {"adam_mini": "1", "elementwise": 0}}',
                                  '{"cost": {"adam_mini": 1, "adam_mini": 2, "elementwise": 0}}'])  # fmt: skip
def test_a_damaged_prediction_is_named(tmp_path: Path, text: str) -> None:
    runs, path = load_runs(write_grid(tmp_path / "results")), tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cost\.json .*run `python -m experiments\.studies\.predicted_cost` again"):
        with_prediction(runs, path)
