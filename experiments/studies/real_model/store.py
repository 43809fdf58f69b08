"""Files of results: one JSON file per task, rewritten atomically after every sample."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.storage import environment, read_json, write_atomic
from experiments.studies.real_model.measure import KINDS
from experiments.studies.real_model.plan import Settings, Task, as_json
from experiments.studies.real_model.subject import Subject


def _fixed(subject: Subject, settings: Settings, task: Task) -> dict[str, Any]:
    """Return what all samples of a file have in common. Their number is not part of it: more may be added later."""
    described = dataclasses.asdict(task)
    del described["samples"]
    everything = as_json(settings)
    return {
        "task": described,
        "settings": {key: everything[key] for key in KINDS[task.kind][1]},
        "subject": subject.facts,
    }


def load(folder: Path, subject: Subject, settings: Settings, task: Task) -> dict[str, Any]:
    """Read a task's results so far; return a document without samples if it has not begun.

    Raises:
        ValueError: the file is damaged, or its samples were taken with other settings or of another model; the message
            names the file.
    """
    path, fixed = folder / f"{task.name}.json", _fixed(subject, settings, task)
    document = read_json(path)
    if document is None:
        return {**fixed, "environment": environment(), "facts": {}, "seconds": [], "samples": []}
    if not isinstance(document, dict) or not isinstance(document.get("samples"), list):
        raise ValueError(f"{path} is damaged (it has no list of samples); move it away to measure it again")
    for key, value in fixed.items():
        if document.get(key) != value:
            raise ValueError(
                f"{path} has {key}={document.get(key)}, this study has {value}; give another --out, or move it away"
            )
    return document


def save(folder: Path, task: Task, document: dict[str, Any]) -> None:
    """Write a task's results atomically, one sample per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key != "samples"]
    samples = ",\n".join(json.dumps(sample, separators=(",", ":")) for sample in document["samples"])
    text = "{\n" + ",\n".join(lines) + f',\n"samples": [\n{samples}\n]\n}}\n'
    write_atomic(folder / f"{task.name}.json", text.encode())
