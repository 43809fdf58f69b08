"""Results of a role study whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from analysis.role_study import FIT, HELD_OUT, MIXED, WHOLE_SETS

UNITS = ("TENSOR", "OUT_NEURON", "IN_NEURON", "FACTORED")
ROLES = dict.fromkeys(("VALUE", "ATTENTION_OUT", "MLP_IN", "MLP_OUT"), UNITS)
ROLES |= dict.fromkeys(("QUERY", "KEY"), ("ATTENTION_HEAD", *UNITS[1:]))
ROLES |= dict.fromkeys(("TOKEN_EMBEDDING", "HEAD"), ("TENSOR", "TOKEN", "IN_NEURON", "FACTORED"))
ROLES |= {"NORM": ("TENSOR",)}
SLOPE, BASE = 0.5, 2.0


def write_study(folder: Path, *, surprise: float = 0.0, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Write a study in which every gap is ``SLOPE`` times the criterion ``good``, at both learning rates.

    ``bad`` is random, ``constant`` is constant, and ``scalars`` is ``good`` itself but must not win. The whole set
    costs the sum of its roles, plus ``surprise`` nats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator, rows = np.random.default_rng(0), []
    for model, data in (FIT, HELD_OUT, *MIXED):
        for lr in (3e-3, 1e-2):
            arms = [f"{role}/{unit}" for role, units in ROLES.items() for unit in units]
            good = dict(zip(arms, generator.uniform(0.01, 0.1, len(arms)).tolist(), strict=True))
            for seed in seeds:
                name, base = f"{model}-{data}-{lr:g}-{seed}", BASE + 0.1 * seed
                losses = {"adamw": base, "twin": base + 1e-4 * (seed - 1)}
                losses |= {arm: base + SLOPE * value for arm, value in good.items()}
                for rules, units in WHOLE_SETS.items():
                    parts = [good.get(f"{role}/{unit}", 0.0) for role, unit in units.items()]
                    losses[rules] = base + SLOPE * sum(parts) + surprise
                runs = {arm: {"final_val_loss": loss, "seconds": 1.0} for arm, loss in losses.items()}
                cell = {"model": model, "data": data, "lr": lr, "seed": seed}
                (folder / f"{name}.json").write_text(json.dumps({"cell": cell, "runs": runs}))
                rows += [[name, arm, value, value, float(generator.uniform()), 1.0] for arm, value in good.items()]
    columns = ["cell", "arm", "scalars", "good", "bad", "constant"]
    (folder / "criteria.json").write_text(json.dumps({"columns": columns, "rows": rows}))
    return folder


def edit(folder: Path, name: str, arm: str, loss: float | None, *, remove: bool = False) -> None:
    """Change the loss of one run, or remove the run."""
    path = folder / f"{name}.json"
    document = json.loads(path.read_text())
    if remove:
        del document["runs"][arm]
    else:
        document["runs"][arm]["final_val_loss"] = loss
    path.write_text(json.dumps(document))
