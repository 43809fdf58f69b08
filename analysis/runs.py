"""One training run as its folder holds it: only a finished or a diverged run is a result, and only a whole one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from analysis.documents import damaged, is_finite, parse, read_object

FORMAT_VERSION = 1
RESULTS = ("finished", "diverged")
"""States of a run that are results."""
_MEND = "delete the folder and run `make ablation` again"
"""A damaged run counts as finished for the runner, so its folder has to go before it is run again."""
_CONFIG = ("arm", "lr", "seed", "steps", "eval_every")


def state_of(run: Path) -> str:
    """The state that a run's ``status.json`` names, or "without a status".

    Raises:
        ValueError: a damaged status, or one of another format version.
    """
    path = run / "status.json"
    if not path.is_file():
        return "without a status"
    status = _read(path)
    if not isinstance(status.get("state"), str):
        raise _damaged(run, "its status.json names no state")
    if status.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{run} has format_version={status.get('format_version')}; this release reads {FORMAT_VERSION}: read it "
            "with the release that wrote it, or delete the folder and run `make ablation` again"
        )
    return str(status["state"])


def read_run(run: Path) -> dict[str, Any]:
    """The row of a finished or diverged run; a diverged one has an infinite loss.

    Returns:
        arm, lr, seed, state, final_val_loss, second_moment_scalars, parameters, steps, curve, and ``config``, the
        whole content of ``config.json``.

    Raises:
        ValueError: the run is damaged: a file is missing or cut, or two of its files contradict each other.
    """
    config, status = _read(run / "config.json"), _read(run / "status.json")
    if missing := [key for key in _CONFIG if key not in config]:
        raise _damaged(run, f"config.json lacks {missing[0]}")
    for key in ("steps", "eval_every"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise _damaged(run, f"{key}={config[key]!r} in config.json is no number of steps")
    if (found := config_hash(config)) != run.name:
        raise _damaged(run, f"its config.json has the hash {found}, which is not the folder's name")
    _read(run / "environment.json")
    for key in ("second_moment_scalars", "parameters"):
        if not isinstance(count := status.get(key), int) or isinstance(count, bool) or count < 1:
            raise _damaged(run, f"{key}={count!r} in status.json is no number of elements")
    curve = _curve(run)
    if status["state"] == "finished":
        _require_whole(run, config, status, curve)
    return {
        "arm": config["arm"], "lr": config["lr"], "seed": config["seed"], "state": status["state"],
        "final_val_loss": status["final_val_loss"] if status["state"] == "finished" else float("inf"),
        "second_moment_scalars": status["second_moment_scalars"], "parameters": status["parameters"],
        "steps": config["steps"], "curve": curve, "config": config,
    }  # fmt: skip


def config_hash(config: dict[str, Any]) -> str:
    """The name that the trainer gives the folder of a config: twelve digits of its content's sha256."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _damaged(path.parent, f"{path.name} is missing")
    try:
        return read_object(path, _MEND)
    except ValueError as error:
        raise _damaged(path.parent, f"{path.name}: {error.__cause__ or 'it holds no object'}") from error


def _damaged(run: Path, why: str) -> ValueError:
    return damaged(run, why, _MEND)


def _curve(run: Path) -> list[Any]:
    """The points of ``metrics.jsonl``; none where there is no file, as when a run diverges before its first."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [parse(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise _damaged(run, f"{path.name}: {error}") from error


def _require_whole(run: Path, config: dict[str, Any], status: dict[str, Any], curve: list[Any]) -> None:
    """The curve of a finished run has every point, and ends with the loss that its status names."""
    steps, every, loss = config["steps"], config["eval_every"], status.get("final_val_loss")
    wanted = [*range(every, steps, every), steps]
    for place, step in enumerate(wanted):
        point = curve[place] if place < len(curve) else None
        if not isinstance(point, dict) or point.get("step") != step:
            raise _damaged(run, f"metrics.jsonl lacks the point of step {step}, though status.json says finished")
        for key in ("tokens", "val_loss"):
            if not is_finite(value := point.get(key)):
                raise _damaged(run, f"{key}={value!r} of step {step} in metrics.jsonl is no finite number")
    if len(curve) > len(wanted):
        raise _damaged(run, f"metrics.jsonl has {len(curve)} points, not {len(wanted)}")
    if not is_finite(loss):
        raise _damaged(run, f"final_val_loss={loss!r} in status.json is no finite number, though the run finished")
    if loss != curve[-1]["val_loss"]:
        raise _damaged(run, f"final_val_loss={loss!r} in status.json is not the {curve[-1]['val_loss']!r} of its curve")
