"""Stages of a study: grids grow past a best rate at their end, best rates get more seeds, equal runs are taken over."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.ablation import plan, run_stages
from experiments.configs import TrainConfig, smoke
from experiments.grids import Study
from experiments.growing import MOST_GROWN, equal_run, following, neighbour, so_far, take_over
from experiments.runner import Outcome
from experiments.storage import read_json, write_json
from experiments.train import run_folder

STUDY = Study(smoke, ("elementwise", "adam_mini"), (1e-3, 3e-3, 1e-2), (0,), more=(1, 2), grows=True)


def grid(study: Study = STUDY, experiment: str = "s_cpu") -> list[TrainConfig]:
    return [
        replace(smoke(), experiment=experiment, arm=arm, lr=lr, seed=seed)
        for seed, _, lr, arm in study.runs(study.arms)
    ]


def end(config: TrainConfig, root: Path, loss: float | None) -> None:
    folder = run_folder(root, config.with_rules_hash())
    state = "diverged" if loss is None else "finished"
    write_json(folder / "config.json", config.with_rules_hash().to_dict())
    for name in ("environment.json", "metrics.jsonl"):
        write_json(folder / name, {})
    write_json(folder / "status.json", {"state": state, "format_version": 1, "final_val_loss": loss})


def end_all(configs: list[TrainConfig], root: Path, best: dict[str, float]) -> None:
    """The loss is the distance of the rate to the arm's best one."""
    for config in configs:
        end(config, root, abs(math.log10(config.lr / best[config.arm])))


def found(configs: list[TrainConfig]) -> list[tuple[str, float, int]]:
    return [(config.arm, config.lr, config.seed) for config in configs]


def test_neighbouring_rates_are_ones_and_threes() -> None:
    assert [neighbour(lr, True) for lr in (1e-3, 3e-3, 1e-2, 0.3)] == [3e-3, 1e-2, 3e-2, 1.0]
    assert [neighbour(lr, False) for lr in (1e-3, 3e-3, 1.0)] == [3e-4, 1e-3, 0.3]


def test_a_best_rate_inside_the_grid_gets_more_seeds(tmp_path: Path) -> None:
    configs = grid()
    assert following(STUDY, configs, tmp_path) == []
    end_all(configs, tmp_path, {"elementwise": 3e-3, "adam_mini": 3e-3})
    more = following(STUDY, configs, tmp_path)
    assert found(more) == [(arm, 3e-3, seed) for seed in (1, 2) for arm in STUDY.arms]
    assert following(STUDY, configs + more, tmp_path) == []
    # The further seeds do not choose: a bad second seed leaves the best rate where it was.
    end_all(more, tmp_path, {"elementwise": 1.0, "adam_mini": 1.0})
    assert so_far(STUDY, configs, tmp_path) == configs + more


def test_a_grid_grows_until_its_best_rate_is_inside(tmp_path: Path) -> None:
    configs = grid()
    end_all(configs, tmp_path, {"elementwise": 3e-3, "adam_mini": 1e-1})
    grown = following(STUDY, configs, tmp_path)
    assert ("adam_mini", 3e-2, 0) in found(grown) and ("adam_mini", 1e-2, 1) not in found(grown)
    best = {"elementwise": 3e-3, "adam_mini": 1e-1}
    for _ in range(4):
        everything = so_far(STUDY, configs, tmp_path)
        end_all(everything, tmp_path, best)
    mine = sorted({config.lr for config in everything if config.arm == "adam_mini"})
    assert mine == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    assert {(lr, seed) for arm, lr, seed in found(everything) if arm == "adam_mini" and seed} == {(0.1, 1), (0.1, 2)}


def test_a_grid_grows_downwards_too(tmp_path: Path) -> None:
    configs = grid()
    end_all(configs, tmp_path, {"elementwise": 3e-3, "adam_mini": 1e-4})
    assert ("adam_mini", 3e-4, 0) in found(following(STUDY, configs, tmp_path))


def test_growth_ends(tmp_path: Path) -> None:
    configs = grid()
    for _ in range(10):
        everything = so_far(STUDY, configs, tmp_path)
        end_all(everything, tmp_path, {"elementwise": 1e9, "adam_mini": 1e9})
    assert len({config.lr for config in everything}) == 3 + MOST_GROWN


def test_an_arm_that_diverged_everywhere_or_is_unfinished_calls_for_nothing(tmp_path: Path) -> None:
    configs = grid()
    for config in configs:
        if config.arm == "adam_mini":
            end(config, tmp_path, None)
    assert following(STUDY, configs, tmp_path) == []


def test_a_diverged_rate_loses(tmp_path: Path) -> None:
    configs = grid()
    for config in configs:
        end(config, tmp_path, None if config.lr == 1e-2 else 1 - config.lr)
    assert {lr for _, lr, _ in found(following(STUDY, configs, tmp_path))} == {3e-3}


def test_equal_runs_of_other_studies_are_taken_over(tmp_path: Path) -> None:
    configs = grid()
    end(replace(configs[0], experiment="other_cpu"), tmp_path, 1.5)
    end(replace(configs[1], experiment="other_cpu", steps=19), tmp_path, 1.5)  # not equal
    assert [bool(equal_run(config, tmp_path, ("nothing", "other"))) for config in configs] == [True] + [False] * 5
    assert "6 runs, 5 left" in plan(configs, tmp_path, 1, replace(STUDY, shares=("other",))).splitlines()[-1]
    assert take_over(configs, tmp_path, ("other",)) == 1 and take_over(configs, tmp_path, ("other",)) == 0
    folder = run_folder(tmp_path, configs[0].with_rules_hash())
    status = read_json(folder / "status.json")
    original = run_folder(tmp_path, replace(configs[0], experiment="other_cpu").with_rules_hash())
    assert status["final_val_loss"] == 1.5 and tmp_path / status["taken_from"] == original
    assert TrainConfig.from_dict(read_json(folder / "config.json")).hash == folder.name


@pytest.mark.timeout(240)
def test_a_study_runs_all_of_its_stages(tmp_path: Path) -> None:
    study = replace(STUDY, arms=("elementwise",), rates=(1e-3, 3e-3), more=(1,), grows=False)
    outcome = run_stages([replace(c, steps=4) for c in grid(study)], tmp_path, study, workers=2)
    assert outcome.done == 3 and not outcome.failed
    assert sorted(c["seed"] for c in (read_json(p) for p in (tmp_path / "s_cpu").glob("*/config.json"))) == [0, 0, 1]
    only = run_stages([replace(c, steps=4) for c in grid(study)], tmp_path / "b", study, only="elementwise 0.001 0")
    assert only.done == 1


def test_an_arm_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run_many(configs: list[TrainConfig], root: Path, **_: object) -> Outcome:
        calls.append([config.arm for config in configs])
        good = [config for config in configs if config.arm == "elementwise"]
        end_all(good, root, {"elementwise": 3e-3})
        bad = [run_folder(root, config.with_rules_hash()) for config in configs if config not in good]
        return Outcome(len(good), tuple(bad))

    monkeypatch.setattr("experiments.ablation.run_many", run_many)
    outcome = run_stages(grid(), tmp_path, STUDY)
    assert calls[0].count("adam_mini") == 3 and calls[1].count("elementwise") == 5 and "adam_mini" not in calls[1]
    assert len(outcome.failed) == 3


def test_an_equal_run_that_diverged_at_once_is_taken_over(tmp_path: Path) -> None:
    configs = grid()
    other = replace(configs[0], experiment="other_cpu")
    end(other, tmp_path, None)
    (run_folder(tmp_path, other.with_rules_hash()) / "metrics.jsonl").unlink()
    assert take_over(configs, tmp_path, ("other",)) == 1
