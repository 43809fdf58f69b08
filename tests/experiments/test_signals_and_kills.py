"""What happens to real processes: SIGTERM, SIGINT, SIGKILL of one rank and of all. The end is always the same bits.

Twenty kills: ``python -m tests.experiments.kills``; here are two, one of them as a checkpoint is written.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments.configs import TrainConfig
from experiments.grids import grid
from experiments.runner import run_many
from experiments.train import run_folder, train
from tests.experiments import kills
from tests.experiments.processes import (
    children,
    command,
    kill,
    metrics,
    start,
    status,
    steps,
    torchrun,
    torn,
    wait_until,
)  # fmt: skip

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("a run nobody disturbs")]
RUN = kills.config(60, 5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two FSDP2 ranks that nobody disturbs: status and records."""
    root = tmp_path_factory.mktemp("straight")
    return {**kills.finish(RUN, root), "records": metrics(run_folder(root, RUN))}


def test_a_signal_ends_the_step_saves_and_says_so(tmp_path: Path, config: TrainConfig) -> None:
    config = dataclasses.replace(config, steps=200, checkpoint_every=0).with_rules_hash()
    folder, log = run_folder(tmp_path / "a", config), tmp_path / "log.txt"
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        said = len(log.read_text()) if log.exists() else 0
        process = start(command(config, tmp_path / "a"), log)
        wait_until(lambda said=said: "val" in log.read_text()[said:], process, log=log)  # type: ignore[misc]
        os.kill(process.pid, number)
        os.kill(process.pid, number)  # as from a scheduler and then from torchrun: one is enough, two are no more
        assert process.wait(timeout=60) == 128 + number, log.read_text()[-3000:]
        now = status(folder)
        assert (now["state"], now["signal"]) == ("interrupted", number)
        assert before < now["steps"] < 200 and steps(folder)[-1] == now["steps"] and torn(folder) == []
        assert f"stopped after step {now['steps']}, saved" in log.read_text()
        before = now["steps"]
    resumed, straight = train(config, tmp_path / "a"), train(config, tmp_path / "b")
    assert resumed["state"] == "finished" and resumed["weights_sha256"] == straight["weights_sha256"]
    assert metrics(folder) == metrics(run_folder(tmp_path / "b", config))


def test_torchrun_starts_again_what_was_killed_and_not_what_was_stopped(
    tmp_path: Path, straight: dict[str, Any]
) -> None:
    folder, log = run_folder(tmp_path, RUN), tmp_path / "log.txt"
    agent = torchrun(RUN, tmp_path, log, "--parallel=fsdp2")
    try:
        wait_until(lambda: steps(folder), agent, log=log)
        workers = children(agent.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        wait_until(lambda: "resumed" in log.read_text(), agent, log=log)  # --max-restarts: no one had to ask
        before = steps(folder)
        os.kill(children(agent.pid)[1], signal.SIGTERM)  # the second process alone: both stop, at one step
        assert agent.wait(timeout=120) == 0, log.read_text()[-3000:]
    finally:
        kill([agent])
    said = status(folder)
    assert said["state"] == "interrupted" and said["steps"] == steps(folder)[-1] >= before[-1] and torn(folder) == []
    agent = torchrun(RUN, tmp_path, log, "--parallel=fsdp2")
    try:
        wait_until(lambda: log.read_text().count("resumed") == 2, agent, log=log)
        agent.send_signal(signal.SIGTERM)  # torchrun passes it on, waits, and ends as one that was terminated
        assert agent.wait(timeout=120) != 0
    finally:
        kill([agent])
    assert status(folder)["state"] == "interrupted" and status(folder)["steps"] > said["steps"], log.read_text()
    kills.finish(RUN, tmp_path)
    assert status(folder)["weights_sha256"] == straight["weights_sha256"]
    assert metrics(folder) == straight["records"]


def test_killed_at_any_moment_the_weights_are_the_same(tmp_path: Path, straight: dict[str, Any]) -> None:
    chance = random.Random(0)
    seen = [kills.kill_once(RUN, tmp_path, aimed, chance, within=0.5) for aimed in (True, False)]
    assert seen[0] is not None, "the run ended before it could be killed"
    assert seen[0]["unfinished"] or seen[0]["left"]  # the first kill came while a checkpoint was written, or just then
    assert kills.finish(RUN, tmp_path)["weights_sha256"] == straight["weights_sha256"]
    assert metrics(run_folder(tmp_path, RUN)) == straight["records"]


def test_a_sweep_passes_the_signal_on_goes_on_later_and_is_not_run_twice(tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log.txt"
    arguments = ["-m", "experiments.ablation", "--profile=smoke", f"--results={results}",
                 "--arms", "permuted", "adam_mini"]  # fmt: skip
    sweep = start([*arguments, "--workers=1"], log)
    wait_until(lambda: list(results.glob("*/*/environment.json")), sweep, log=log)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(timeout=60) == 1
    states = [status(path.parent)["state"] for path in results.glob("*/*/status.json")]
    assert states in (["interrupted"], ["finished"]) and "0 failed" in log.read_text(), log.read_text()
    assert start(arguments, log).wait(timeout=240) == 0, log.read_text()[-3000:]
    assert "2 runs done, 0 failed, 0 interrupted" in log.read_text()
    files = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    assert {path.name for path in files} == {"config.json", "environment.json", "metrics.jsonl", "status.json"}
    messages: list[str] = []
    outcome = run_many(grid("smoke", ("permuted", "adam_mini")), results, say=messages.append)
    assert (outcome.done, outcome.failed, outcome.interrupted) == (2, (), ()) and "2 already finished" in messages[0]
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()} == files
