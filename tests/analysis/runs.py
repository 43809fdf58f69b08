"""Made-up results folders, in the format the trainer leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ARMS = {"elementwise": 1000, "adam_mini": 50}
RATES = (0.001, 0.01)
SEEDS = (0, 1, 2)


def write_run(
    folder: Path, arm: str, lr: float, seed: int, loss: float, config: dict[str, Any] | None = None, **status: Any
) -> Path:
    """One finished run; ``config`` and ``status`` override what its files say."""
    document = {"arm": arm, "lr": lr, "seed": seed, "steps": 20, "eval_every": 10, **(config or {})}
    name = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(document))
    (run / "environment.json").write_text(json.dumps({"torch": "2"}))
    facts = {"state": "finished", "format_version": 1, "final_val_loss": loss, "parameters": 1000}
    facts |= {"second_moment_scalars": ARMS.get(arm, 7), **status}
    (run / "status.json").write_text(json.dumps(facts))
    points = [{"step": step, "tokens": 64 * step, "val_loss": loss + 0.1 * (20 - step)} for step in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return run


def write_grid(folder: Path) -> Path:
    """Two arms, two rates, three seeds; seeds shift both arms alike, ``adam_mini`` is 0.1 worse with a small spread."""
    for arm in ARMS:
        for lr in RATES:
            for seed in SEEDS:
                worse = (0.1 + 0.001 * seed if arm == "adam_mini" else 0.0) + (0.5 if lr == 0.001 else 0.0)
                write_run(folder, arm, lr, seed, 2.0 + seed + worse)
    return folder
