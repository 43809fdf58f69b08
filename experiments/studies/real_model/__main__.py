"""The study's command: measure what has no results yet, one task after another, and resume where it stopped."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.interruption import Interruption
from experiments.storage import require_writable
from experiments.studies.real_model.measure import KINDS
from experiments.studies.real_model.plan import Settings, Task, plan
from experiments.studies.real_model.store import load, save
from experiments.studies.real_model.subject import Subject, smollm2


def run(
    subject: Subject,
    settings: Settings,
    out: Path,
    *,
    only: str = "",
    minutes: float = float("inf"),
) -> list[Task]:
    """Take the samples that the results lack, in the order of the plan, and return the tasks that are not finished.

    SIGTERM and SIGINT stop the study after the present sample.

    Args:
        subject: the model and its data.
        settings: sizes and numbers of samples.
        out: folder of the results.
        only: regular expression that the names of the tasks must contain.
        minutes: start no sample after this time.

    Raises:
        ValueError: a file of results is damaged or was measured with other settings.
    """
    tasks = [task for task in plan(subject, settings) if re.search(only, task.name)]
    taken = {task.name: len(load(out, subject, settings, task)["samples"]) for task in tasks}
    started = time.monotonic()
    with Interruption() as interruption, tqdm(total=sum(t.samples for t in tasks), desc="samples") as bar:
        bar.update(sum(min(taken[t.name], t.samples) for t in tasks))
        for task in tasks:
            document, prepared = load(out, subject, settings, task), None
            bar.set_postfix_str(task.name)
            while len(document["samples"]) < task.samples:
                if interruption.signal or time.monotonic() - started > 60 * minutes:
                    return [t for t in tasks if len(load(out, subject, settings, t)["samples"]) < t.samples]
                begun = time.perf_counter()
                prepared = prepared or KINDS[task.kind][0](subject, settings, task)
                document["samples"].append(prepared.sample(len(document["samples"])))
                document["facts"] = prepared.facts
                document["seconds"].append(round(time.perf_counter() - begun, 1))
                save(out, task, document)
                bar.update()
    return []


def main(
    out: Path = Path("results/real_model"),
    dry_run: bool = False,
    only: str = "",
    minutes: float = float("inf"),
) -> None:
    """Measure SmolLM2-135M-Instruct (4-bit weights, de-quantised to fp32) on one thread.

    Args:
        out: folder of the results, one JSON file per task.
        dry_run: list the tasks and the samples that each of them lacks, and measure nothing.
        only: regular expression that the names of the tasks must contain.
        minutes: start no sample after this time.
    """
    torch.set_num_threads(1)
    settings = Settings()
    with refusals(ValueError, OSError, RuntimeError):
        re.compile(only)
        require_writable(out, "out")
        subject = smollm2()
        if dry_run:
            for task in plan(subject, settings):
                done = len(load(out, subject, settings, task)["samples"])
                print(f"{task.name}: {done} of {task.samples} samples")
            return
        for task in plan(subject, settings):
            load(out, subject, settings, task)
    left = run(subject, settings, out, only=only, minutes=minutes)
    print(f"{len(left)} tasks are not finished; results in {out}")


if __name__ == "__main__":
    tyro.cli(main)
