"""Many runs and their names: hashes that move with every input, failures that are counted, folders that are locked."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import ablation, runner
from experiments.configs import CONFIGS, TrainConfig, smoke
from experiments.grids import ARMS, LEARNING_RATES, SEEDS, grid
from experiments.interruption import Interruption
from experiments.runner import Launch, run_many, run_one, seconds_per_run
from experiments.train import run_folder
from optimizer import Rules

# ---------------------------------------------------------------------------------------------------- hashes


@pytest.mark.parametrize("make", CONFIGS.values())
def test_config_survives_json(make: object) -> None:
    config = make()  # type: ignore[operator]
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.hash == config.hash


def test_every_field_moves_the_hash(config: TrainConfig) -> None:
    other = {"model": dataclasses.replace(config.model, dim=64), "data": "enwik8", "arm": "slim_adam"}
    other |= {"precision": "bf16", "decay": "cosine", "lr_end": 0.1}
    variants = [config]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in other:
            other[field.name] = value + "x" if isinstance(value, str) else value + 1 if value >= 1 else value / 2 or 1
        variants.append(dataclasses.replace(config, **{field.name: other[field.name]}))
    assert len({v.hash for v in variants}) == len(variants)


def test_hash_is_pinned() -> None:
    # Committed results are found again only as long as this stays: changing it needs a new format version.
    assert grid("cpu")[0].with_rules_hash().hash == "149f78a97335"


def test_rules_file_with_other_content_is_another_run(tmp_path: Path, config: TrainConfig) -> None:
    path = tmp_path / "rules.json"
    config = dataclasses.replace(config, arm=str(path))
    hashes = []
    for rules in (Rules("adam_mini"), Rules("slim_adam"), Rules("adam_mini").override({"*.wq.weight": "TENSOR"})):
        rules.save(path)
        hashes.append(config.with_rules_hash().hash)
    assert len(set(hashes)) == 3


def test_other_version_of_a_config_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="format_version=99"):
        TrainConfig.from_dict({**config.to_dict(), "format_version": 99})


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch", 0), ("eval_every", 0), ("warmup", 1.0)])
def test_impossible_sizes_are_named(config: TrainConfig, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        dataclasses.replace(config, **{field: value})


# ------------------------------------------------------------------------------------------------------ grid


def test_grid_is_complete_and_balanced() -> None:
    runs = grid("cpu")
    assert len(runs) == len(ARMS) * len(LEARNING_RATES) * len(SEEDS) == 81
    assert len({run.hash for run in runs}) == 81
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    same = {dataclasses.replace(run, arm="", lr=0.1, seed=0) for run in runs}
    assert len(same) == 1  # nothing else differs between arms


def test_carry_over_is_another_model_and_corpus() -> None:
    runs = grid("cpu", study="carry_over")
    assert len(runs) == 5 * 2 * 8 and {run.experiment for run in runs} == {"carry_over_cpu"}
    assert {(type(run.model).__name__, run.data) for run in runs} == {("GPTConfig", "enwik8")}
    results = Path(__file__).resolve().parents[2] / "results" / "carry_over_cpu"
    assert {run.with_rules_hash().hash for run in runs} == {path.name for path in results.iterdir()}
    assert {run.experiment for run in grid("smoke", study="carry_over")} == {"carry_over_smoke"}


def test_a_grid_grows_for_single_arms() -> None:
    runs = grid("cpu", study="statistics")
    assert len(runs) == len({run.hash for run in runs}) == 7 * 3 * 3 + 3 * 3
    assert sorted({run.lr for run in runs if run.arm == "adam_mini_max"}) == [1e-3, 3e-3, 1e-2, 3e-2]
    assert sorted({run.lr for run in runs if run.arm == "adam_mini"}) == list(LEARNING_RATES)
    assert {run.lr for run in grid("smoke", study="statistics")} == {1e-3}
    assert {run.arm for run in grid("cpu", ("adam_mini",), "statistics")} == {"adam_mini"}


def test_unknown_arms_and_studies_are_named() -> None:
    with pytest.raises(ValueError, match=r"arms=\['adam'\]"):
        grid("cpu", ("adam",))
    with pytest.raises(ValueError, match=r"arms=\['permuted'\]"):
        grid("cpu", ("permuted",), "carry_over")
    with pytest.raises(ValueError, match=r"study='muon'.*carry_over"):
        grid("cpu", study="muon")


# ---------------------------------------------------------------------------------------------------- runner


def test_failed_run_is_counted_and_recorded(tmp_path: Path) -> None:
    broken = dataclasses.replace(smoke(), experiment="test", data="no-such-corpus")
    outcome = run_many([broken], tmp_path, workers=1, say=lambda _: None)
    folder = run_folder(tmp_path, broken.with_rules_hash())
    assert (outcome.done, outcome.failed) == (0, (folder,))
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "no-such-corpus" in status["error"]


def test_a_run_over_its_limit_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = dataclasses.replace(smoke(), experiment="test", steps=10**6, checkpoint_every=0)
    short = dataclasses.replace(smoke(), experiment="test", seed=1)
    folder = run_folder(tmp_path, long.with_rules_hash())

    def over(run: runner._Running, minutes: float) -> bool:
        """The long run's time is up as soon as it has a record; the time to save is not."""
        return run.folder == folder and minutes == 7 and (folder / "metrics.jsonl").is_file()

    monkeypatch.setattr(runner._Running, "over", over)
    said: list[str] = []
    outcome = run_many([long, short], tmp_path, workers=1, each=Launch(limit=7), say=said.append)
    assert (outcome.done, outcome.failed) == (1, (folder,)) and any("over its limit" in line for line in said)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "limit=7 minutes; the same command continues it" in status["error"]
    assert any((folder / "checkpoints").iterdir())  # what it had done is not lost


def test_runs_that_end_or_are_interrupted_are_not_blamed_on_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time is up all the while, but one has ended by itself, and the pool was asked to stop before the other."""
    asked: list[Path] = []

    def require(run: runner._Running, process: subprocess.Popen[bytes], minutes: float) -> None:
        asked.append(run.folder)
        process.terminate()

    monkeypatch.setattr(runner._Running, "require_limit", require)
    broken = dataclasses.replace(smoke(), experiment="test", data="no-such-corpus").with_rules_hash()
    long = dataclasses.replace(smoke(), experiment="test", steps=10**6).with_rules_hash()
    start = Launch.start

    def ended(self: Launch, config: TrainConfig, root: Path, **more: bool) -> subprocess.Popen[bytes]:
        process = start(self, config, root, **more)
        if config == broken:
            process.wait()
        return process

    class Signalled(Interruption):
        """A signal arrives when the second run has begun to write."""

        @property
        def signal(self) -> int:
            return 15 if (run_folder(tmp_path, long) / "config.json").is_file() else 0

        @signal.setter
        def signal(self, number: int) -> None:
            pass

    monkeypatch.setattr(Launch, "start", ended)
    monkeypatch.setattr(runner, "Interruption", Signalled)
    outcome = run_many([broken, long], tmp_path, workers=1, each=Launch(limit=7), say=lambda _: None)
    assert asked == [] and outcome.failed == (run_folder(tmp_path, broken),)
    assert outcome.interrupted == (run_folder(tmp_path, long),)
    assert "no-such-corpus" in json.loads((run_folder(tmp_path, broken) / "status.json").read_text())["error"]


def test_a_killed_run_and_one_that_cannot_start_are_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"experiment": "test", "checkpoint_every": 0}
    killed = dataclasses.replace(smoke(), steps=10**6, **shared).with_rules_hash()
    refused, fine = (dataclasses.replace(smoke(), seed=seed, **shared).with_rules_hash() for seed in (1, 2))
    start = Launch.start

    def begin(self: Launch, config: TrainConfig, root: Path, **more: bool) -> subprocess.Popen[bytes]:
        if config == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        process = start(self, config, root, **more)
        if config == killed:
            process.kill()
        return process

    monkeypatch.setattr(Launch, "start", begin)
    folder = run_folder(tmp_path, killed)
    folder.mkdir(parents=True)
    interrupted = {"state": "interrupted", "format_version": 1}
    (folder / "status.json").write_text(json.dumps(interrupted))  # an earlier attempt was stopped
    said: list[str] = []
    outcome = run_many([killed, refused, fine], tmp_path, workers=2, say=said.append)
    assert outcome.done == 1 and set(outcome.failed) == {folder, run_folder(tmp_path, refused)}
    assert any("not started: " in line and "No space left" in line for line in said)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "exit code -9; the same command continues it" in status["error"]


def test_a_run_whose_status_is_damaged_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, fine = (dataclasses.replace(smoke(), experiment="test", seed=seed).with_rules_hash() for seed in (1, 2))
    start = Launch.start

    def begin(self: Launch, config: TrainConfig, root: Path, **more: bool) -> subprocess.Popen[bytes]:
        process = start(self, config, root, **more)
        if config == damaged:
            process.wait()
            (run_folder(root, config) / "status.json").write_text("{}")
        return process

    monkeypatch.setattr(Launch, "start", begin)
    said: list[str] = []
    outcome = run_many([damaged, fine], tmp_path, workers=1, say=said.append)
    assert (outcome.done, outcome.failed) == (1, (run_folder(tmp_path, damaged),))
    assert any("names no state" in line for line in said)


def test_runs_that_ignore_a_signal_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(300)",
    ]

    def begin(self: Launch, config: TrainConfig, root: Path, **more: bool) -> subprocess.Popen[bytes]:
        run_folder(root, config).mkdir(parents=True)
        process = subprocess.Popen(deaf, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()  # it ignores the signal from here on
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(Launch, "start", begin)
    monkeypatch.setattr(runner, "GRACE", 1)
    config = dataclasses.replace(smoke(), experiment="test").with_rules_hash()
    outcome = run_many([config], tmp_path, workers=1, say=lambda _: None)
    assert outcome.interrupted == (run_folder(tmp_path, config),)


def test_a_run_that_does_not_stop_is_killed() -> None:
    asked: list[str] = []
    process = SimpleNamespace(terminate=lambda: asked.append("terminate"), kill=lambda: asked.append("kill"))
    run = runner._Running(Path("nowhere"))
    for age in (59, 61, 61 + runner.GRACE - 2, 61 + runner.GRACE):
        run.started = time.monotonic() - age
        run.require_limit(process, 1.0)
    assert asked == ["terminate", "kill"]


def test_time_is_estimated_from_finished_runs_or_from_a_few_steps(tmp_path: Path) -> None:
    config = dataclasses.replace(smoke(), experiment="test", steps=1000)
    measured = seconds_per_run(config.with_rules_hash(), tmp_path)
    assert 0.1 < measured < 1000 and list(tmp_path.iterdir()) == []
    for seconds in (3.0, 5.0, 50.0):
        folder = tmp_path / "test" / str(seconds)
        folder.mkdir(parents=True)
        status = {"state": "finished", "format_version": 1, "seconds": seconds}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert seconds_per_run(config, tmp_path) == 5.0
    longer = dataclasses.replace(config, steps=2000).with_rules_hash()
    assert seconds_per_run(longer, tmp_path) != 5.0, "runs of another length tell nothing"
    broken = dataclasses.replace(config, experiment="other", data="no-such-corpus")
    with pytest.raises(RuntimeError, match="no-such-corpus"):
        seconds_per_run(broken.with_rules_hash(), tmp_path)


def test_runs_are_selected_by_name_and_planned_without_being_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation.main(profile="smoke", results=tmp_path, only="factored|^adam_mini ", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["  adam_mini 0.001 0", "  factored 0.001 0"]
    assert re.fullmatch(r"2 runs, 2 left: about 0\.\d\d hours with 2 at a time", lines[2])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        ValueError, match=r"only='muon' is found in no run; their names are like 'elementwise 0\.001 0'"
    ):
        ablation.selected(grid("smoke"), "muon")
    with pytest.raises(ValueError, match=r"only=.\(. is no regular expression"):
        ablation.selected(grid("smoke"), "(")
    with pytest.raises(ValueError, match="limit=0"):
        Launch(limit=0)


def test_folder_in_use_is_left_alone(tmp_path: Path, config: TrainConfig) -> None:
    config = config.with_rules_hash()
    folder = run_folder(tmp_path, config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="being run by another process"):
            run_one(folder / "config.json", tmp_path)
    assert not (folder / "status.json").exists()
    run_one(folder / "config.json", tmp_path)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_bad_requests_are_refused_before_anything_starts(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="workers=0"):
        run_many([config], tmp_path, workers=0)
    with pytest.raises(ValueError, match="two of the configs are equal"):
        run_many([config, config], tmp_path)
    assert list(tmp_path.iterdir()) == []
