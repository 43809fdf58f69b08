"""Read the folder of one training run. Only a finished or diverged run whose files are all valid is a result."""

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
"""The runner treats a damaged run as finished, so its folder has to be deleted before the run is repeated."""
_CONFIG = ("arm", "lr", "seed", "steps", "eval_every")


def state_of(run: Path) -> str:
    """Return the state in a run's ``status.json``, or "without a status" if there is no such file.

    Raises:
        ValueError: the file is damaged or has another format version.
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
    """Read a finished or diverged run.

    Returns:
        arm, lr, seed, state, final_val_loss (infinite for a diverged run), second_moment_scalars, state_bytes (None for
        runs from before it was recorded), parameters, steps, fingerprint (of the data; may be None), curve, and
        ``config``, the content of ``config.json``.

    Raises:
        ValueError: the run is damaged: a file is missing or truncated, or two files contradict each other.
    """
    config, status = _read(run / "config.json"), _read(run / "status.json")
    if missing := [key for key in _CONFIG if key not in config]:
        raise _damaged(run, f"config.json lacks {missing[0]}")
    for key in ("steps", "eval_every"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise _damaged(run, f"{key}={config[key]!r} in config.json is no number of steps")
    if (digest := config_hash(config)) != run.name:
        raise _damaged(run, f"its config.json has the hash {digest}, which is not the folder's name")
    _read(run / "environment.json")
    # Optimizers without second moments, such as SGD, are arms since state is recorded in bytes.
    least = {"parameters": 1, "second_moment_scalars": 0 if "state_bytes" in status else 1, "state_bytes": 0}
    for key in least if "state_bytes" in status else ("parameters", "second_moment_scalars"):
        if not isinstance(count := status.get(key), int) or isinstance(count, bool) or count < least[key]:
            raise _damaged(run, f"{key}={count!r} in status.json is no number of elements")
    curve = _curve(run)
    if status["state"] == "finished":
        _require_complete_curve(run, config, status, curve)
    return {
        "arm": config["arm"],
        "lr": config["lr"],
        "seed": config["seed"],
        "state": status["state"],
        "final_val_loss": status["final_val_loss"] if status["state"] == "finished" else float("inf"),
        "second_moment_scalars": status["second_moment_scalars"],
        "state_bytes": status.get("state_bytes"),
        "parameters": status["parameters"],
        "steps": config["steps"],
        "fingerprint": status.get("data_fingerprint"),
        "curve": curve,
        "config": config,
    }


def config_hash(config: dict[str, Any]) -> str:
    """Return the name of a config's folder: the first twelve digits of the sha256 of its content."""
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
    """Read the points of ``metrics.jsonl``; a run that diverges before its first point has no such file."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [parse(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise _damaged(run, f"{path.name}: {error}") from error


def _require_complete_curve(run: Path, config: dict[str, Any], status: dict[str, Any], curve: list[Any]) -> None:
    """Check that a finished run's curve has every point and ends with the loss in its status."""
    steps, every, loss = config["steps"], config["eval_every"], status.get("final_val_loss")
    expected_steps = [*range(every, steps, every), steps]
    for i, step in enumerate(expected_steps):
        point = curve[i] if i < len(curve) else None
        if not isinstance(point, dict) or point.get("step") != step:
            raise _damaged(run, f"metrics.jsonl lacks the point of step {step}, though status.json says finished")
        for key in ("tokens", "val_loss"):
            if not is_finite(value := point.get(key)):
                raise _damaged(run, f"{key}={value!r} of step {step} in metrics.jsonl is no finite number")
    if len(curve) > len(expected_steps):
        raise _damaged(run, f"metrics.jsonl has {len(curve)} points, not {len(expected_steps)}")
    if not is_finite(loss):
        raise _damaged(run, f"final_val_loss={loss!r} in status.json is no finite number, though the run finished")
    if loss != curve[-1]["val_loss"]:
        raise _damaged(run, f"final_val_loss={loss!r} in status.json is not the {curve[-1]['val_loss']!r} of its curve")
