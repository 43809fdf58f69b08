"""SIGKILL a run of two FSDP2 ranks again and again: ``python -m tests.experiments.kills --kills 20``.

Every second kill waits until a checkpoint is being written, and comes within milliseconds. The others come at random
moments after training has begun. After each kill, code of this folder checks every visible checkpoint, and the next
start must resume from the newest one. At the end, the weights must equal those of an undisturbed run, bit for bit. With
``--folder``, the folder records the kills so far, so that the script itself may be killed and started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.configs import TrainConfig, smoke
from experiments.train import run_folder
from tests.experiments.processes import kill, metrics, start_ranks, status, steps, torn, wait_until
from tests.sharding import workers

OPTIONS = ("--parallel=fsdp2",)


def config(length: int = 300, every: int = 10) -> TrainConfig:
    """A run that is long enough to be killed."""
    base = dataclasses.replace(smoke(), experiment="kills", steps=length, checkpoint_every=every, eval_every=50)
    return base.with_rules_hash()


def finish(run: TrainConfig, root: Path) -> dict[str, Any]:
    """Resume the run, let it finish, and return its status."""
    folder = run_folder(root, run)
    root.mkdir(parents=True, exist_ok=True)
    if not ended(folder):
        arguments = {"config": run, "root": str(root), "parallel": "fsdp2"}
        answers = workers.run(2, {"run": ("tests.experiments.interrupted_runs:trained", arguments)})["run"]
        assert all(isinstance(answer, dict) for answer in answers), answers
    assert ended(folder)
    return status(folder)


def ended(folder: Path) -> bool:
    return (folder / "status.json").exists() and status(folder)["state"] == "finished"


def kill_once(
    run: TrainConfig, root: Path, aimed: bool, chance: random.Random, within: float = 4.0
) -> dict[str, Any] | None:
    """Resume the run and kill it. Return what was seen, or None if the run finished before the kill.

    Args:
        run: what is trained.
        root: results folder; the output of the ranks is added to ``log.txt`` in it.
        aimed: wait for the write of a checkpoint to begin, and kill within milliseconds of it.
        chance: source of the moment.
        within: seconds after the start of training in which a kill comes that is not aimed.
    """
    folder, log = run_folder(root, run), root / "log.txt"
    checkpoints = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    if ended(folder):
        return None
    known, before = steps(folder), set(checkpoints.glob(".step-*"))
    log.touch()
    said = len(log.read_text())
    ranks = start_ranks(run, root, log, *OPTIONS)
    try:
        wait_until(lambda: "config {" in log.read_text()[said:], *ranks, log=log)  # rank 0 is about to take a step
        if aimed:
            over = [lambda: set(checkpoints.glob(".step-*.tmp-*")) - before, lambda: ended(folder)]
            wait_until(lambda: any(sign() for sign in over), log=log, every=0.002)
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, within))
        if all(r.poll() is not None for r in ranks):
            return None
    finally:
        kill(ranks)
    if ended(folder):
        return None
    assert torn(folder) == [], torn(folder)
    resumed = re.findall(r"resumed .* at step (\d+)", log.read_text()[said:])
    assert [int(step) for step in resumed] == known[-1:], f"{resumed} where {known} were there"
    return {"aimed": aimed, "from": (known or [0])[-1], "left": steps(folder),
            "unfinished": len(list(checkpoints.glob(".step-*.tmp-*")))}  # fmt: skip


def compare(run: TrainConfig, killed: Path, straight: Path) -> None:
    """Finish both runs and check that their weights and records are equal."""
    a, b = finish(run, killed), finish(run, straight)
    assert a["weights_sha256"] == b["weights_sha256"]
    assert metrics(run_folder(killed, run)) == metrics(run_folder(straight, run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None, help="kept, and gone on with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    root.mkdir(parents=True, exist_ok=True)
    record = root / "kills.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    number = max((kill["run"] for kill in done), default=0)
    run = dataclasses.replace(config(600), seed=number)
    while len(done) < given.kills:
        chance = random.Random(f"{given.seed} {len(done)}")
        what = kill_once(run, root / "killed", len(done) % 2 == 1, chance)
        if what is None:  # it came to its end: another seed, another run
            compare(run, root / "killed", root / "straight")
            number += 1
            run = dataclasses.replace(run, seed=number)
            continue
        done.append({"kill": len(done) + 1, "run": number, **what})
        record.write_text("".join(json.dumps(kill) + "\n" for kill in done))
        sys.stdout.write(json.dumps(done[-1]) + "\n")
        sys.stdout.flush()
    for last in range(number + 1):
        compare(dataclasses.replace(run, seed=last), root / "killed", root / "straight")
        sys.stdout.write(f"run {last}: the weights and records of an undisturbed run\n")
    unfinished = sum(kill["unfinished"] for kill in done)
    sys.stdout.write(f"{len(done)} kills, {unfinished} of them with a checkpoint under way; none torn; in {root}\n")


if __name__ == "__main__":
    main()
