"""Run a stored run again and compare: ``python -m experiments.rerun 1b43afb68b31``.

The stored results are not touched. A seeded run agrees to 0.0005 nats across the processors that were tried; what is
allowed here is 0.002.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import tyro

from experiments.commandline import refusals
from experiments.configs import TrainConfig
from experiments.runner import read_config
from experiments.storage import require_writable
from experiments.train import DEFAULTS, fetch, finished, launch, read_status, run_folder

ALLOWED = 0.002
"""Nats by which the final loss may differ."""


def stored(name: str, results: Path) -> Path:
    """Return the folder of a run.

    Args:
        name: its hash, or the first digits of it.
        results: root of the results folders.

    Raises:
        ValueError: no run or more than one has this name, or it has not ended.
    """
    found = sorted(path.parent for path in results.glob(f"*/{name}*/config.json")) if name else []
    if len(found) != 1:
        listed = ", ".join(str(path) for path in found[:3]) or "none"
        raise ValueError(
            f"run={name!r} names {len(found)} runs under {results} ({listed}); give all twelve digits of one, as in "
            "`python -m analysis show EXPERIMENT RUNS`"
        )
    if not finished(found[0]):
        raise ValueError(f"{found[0]} has not ended, so there is nothing to compare with; run its study first")
    return found[0]


def again(folder: Path) -> TrainConfig:
    """Return the config of a stored run.

    Raises:
        ValueError: the config is damaged, or its arm has other rules today than then.
    """
    config = read_config(folder / "config.json")
    today = config.with_rules_hash()
    if today.rules_hash != config.rules_hash:
        raise ValueError(
            f"{folder}: the rules of arm={config.arm!r} have the hash {today.rules_hash} today and had "
            f"{config.rules_hash} then; check out the release that wrote the run"
        )
    return config


def difference(before: dict[str, object], after: dict[str, object]) -> float:
    """Return the distance of two final losses; 0 if both runs diverged, infinite if one did."""
    losses = [status["final_val_loss"] if status["state"] == "finished" else None for status in (before, after)]
    if losses[0] is None or losses[1] is None:
        return 0.0 if losses[0] is losses[1] else float("inf")
    return abs(float(losses[0]) - float(losses[1]))  # type: ignore[arg-type]  # numbers, by the format of the file


def main(
    run: tyro.conf.Positional[str], results: Path = Path("results"), out: Path = Path("out/again"), threads: int = 1
) -> None:
    """Run a stored run again, and compare its final loss with the stored one.

    Args:
        run: hash of the run, or its first digits.
        results: root of the stored results.
        out: root of the results folders of runs that are repeated.
        threads: number of torch threads; the stored runs have 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with refusals(ValueError, OSError, RuntimeError):
        folder = stored(run, results)
        config = again(folder)
        require_writable(out, "out")
        fetch(config)
        shutil.rmtree(run_folder(out, config), ignore_errors=True)  # an earlier repetition would be taken as finished
        code = launch(config, out, DEFAULTS, threads)
    if code:
        raise SystemExit(code)
    before, after = read_status(folder), read_status(run_folder(out, config))
    if before.get("data_fingerprint") != after.get("data_fingerprint"):
        print("the data differs from that of the stored run (data_fingerprint in status.json), so the losses may, too")
    distance = difference(before, after)
    print(
        f"{config.experiment} {config.arm} lr {config.lr:g} seed {config.seed}: stored {_loss(before)}, again "
        f"{_loss(after)}, difference {distance:.6f} (allowed: {ALLOWED})"
    )
    if not distance <= ALLOWED:
        raise SystemExit(1)


def _loss(status: dict[str, object]) -> str:
    return f"{status['final_val_loss']:.6f}" if status["state"] == "finished" else str(status["state"])


if __name__ == "__main__":
    with refusals(ValueError):
        tyro.cli(main)
