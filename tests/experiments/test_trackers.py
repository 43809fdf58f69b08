"""Trackers: what TensorBoard's files hold after a real run, also a resumed one, and what a missing library says."""

from __future__ import annotations

import builtins
import dataclasses
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments import trackers
from experiments.configs import smoke
from experiments.storage import read_json
from experiments.train import Options, Refused, run_folder, train

START = SessionLog.START
CONFIG = dataclasses.replace(smoke(), steps=8, eval_every=2, checkpoint_every=2, experiment="tracked")


def events(folder: Path) -> Iterator[Event]:
    """All events of a run's files, read as TFRecords: length, checksum, content, checksum."""
    for path in sorted((folder / "events").glob("*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            yield Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all events."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_the_records_of_the_run(tmp_path: Path) -> None:
    status = train(CONFIG, tmp_path, Options(track="tensorboard"))
    folder = run_folder(tmp_path, CONFIG.with_rules_hash())
    losses = points(folder)["val_loss"]
    assert [step for step, _ in losses] == [2, 4, 6, 8]
    assert losses[-1][1] == pytest.approx(status["final_val_loss"], rel=1e-6)
    assert set(points(folder)) == {"tokens", "train_loss", "val_loss", "lr", "seconds"}


def test_a_resumed_run_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = trackers.TensorBoard.record

    def stopped_at_four(self: trackers.TensorBoard, values: dict[str, float]) -> None:
        record(self, values)
        if values["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trackers.TensorBoard, "record", stopped_at_four)
        assert train(CONFIG, tmp_path, Options(track="tensorboard"))["state"] == "interrupted"
    assert train(CONFIG, tmp_path, Options(track="tensorboard"))["state"] == "finished"
    steps = [step for step, _ in points(run_folder(tmp_path, CONFIG.with_rules_hash()))["val_loss"]]
    assert steps == [2, 4, 6, 8]
    started = [e.step for e in events(run_folder(tmp_path, CONFIG.with_rules_hash())) if e.session_log.status == START]
    assert started == [1, 6], (
        "the run stopped after step 5; TensorBoard hides what a killed process wrote from there on"
    )


class Broken:
    """A tracker that fails at its second record and at its end."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def record(self, values: dict[str, float]) -> None:
        self.steps.append(int(values["step"]))
        if len(self.steps) == 2:
            raise OSError("No space left on device")

    def close(self) -> None:
        raise RuntimeError("connection lost")


def test_a_run_outlives_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(CONFIG, tmp_path / "plain")
    broken = Broken()
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, config, step: broken)
    status = train(CONFIG, tmp_path / "tracked", Options(track="tensorboard"))
    assert status["state"] == "finished" and status["weights_sha256"] == plain["weights_sha256"]
    assert broken.steps == [2, 4], "nothing is sent after an error"
    assert "tracking ended at step 4, training goes on" in caplog.text and "connection lost" in caplog.text
    folders = [run_folder(tmp_path / root, CONFIG.with_rules_hash()) for root in ("plain", "tracked")]
    steps = [(folder / "metrics.jsonl").read_text().count('"step"') for folder in folders]
    assert steps == [4, 4]


def test_an_error_of_the_run_is_not_hidden_by_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, config, step: Broken())

    def fails(*args: Any, **options: Any) -> None:
        raise MemoryError("the run's own error")

    monkeypatch.setattr("experiments.passes.backward", fails)
    with pytest.raises(MemoryError, match="the run's own error"):
        train(CONFIG, tmp_path, Options(track="tensorboard"))


def test_a_run_resumed_within_a_second_keeps_its_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 1.8e9)
    for start in (0, 2):
        tracker = trackers.TensorBoard(tmp_path, {}, start)
        tracker.record({"step": start + 1, "val_loss": 1.0})
        tracker.close()
    assert [step for step, _ in points(tmp_path)["val_loss"]] == [1, 3]


def test_a_dead_event_thread_does_not_stop_the_run(tmp_path: Path) -> None:
    """A full disk ends the library's thread. A queue with a limit would then fill, and the run would wait for ever."""
    tracker = trackers.TensorBoard(tmp_path, {}, 0)
    tracker.writer.file_writer.event_writer._worker.stop()
    for step in range(1, 41):
        tracker.record({"step": step, "val_loss": 1.0})
    tracker.close()


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    train(CONFIG, tmp_path)
    folder = run_folder(tmp_path, CONFIG.with_rules_hash())
    assert not (folder / "events").exists() and read_json(folder / "status.json")["state"] == "finished"


def test_a_missing_library_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(Refused, match=r"track='wandb' needs wandb .* pip install wandb, or use track='none'"):
        train(CONFIG, tmp_path, Options(track="wandb"))


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_hosted_trackers_get_name_group_config_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """The interface that wandb and trackio share; both were also run for real, offline, outside the tests."""
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(log=lambda values, step: calls.append(("log", step)), finish=lambda: calls.append(("end", 0)))
    module = SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run)
    monkeypatch.setitem(sys.modules, library, module)
    train(CONFIG, tmp_path, Options(track=library))
    (_, options), *rest = calls
    assert options["group"] == "tracked" and options["config"] == CONFIG.with_rules_hash().to_dict()
    assert options["name"].startswith("adam_mini 0.003 0 ") and options["resume"] == "allow"
    assert rest == [("log", 2), ("log", 4), ("log", 6), ("log", 8), ("end", 0)]
