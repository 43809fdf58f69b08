"""Second moments along a short AdamW run: what each form of sharing loses, and the rules that ``derive`` chooses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from experiments.data import batch_at
from experiments.studies.real_model.subject import Batch, Subject, layer_of, loss
from hessian.derive import derive
from hessian.own_model import evidence, second_moments

if TYPE_CHECKING:
    from experiments.studies.real_model.plan import Settings

COLUMNS = ("tensor", "layer", "role", "unit", "n_params", "n_blocks", "jensen", "jensen_null", "z")


def moments(subject: Subject, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a copy of the model, and compare the second moments with every form of sharing.

    Returns:
        ``losses`` of the steps, in nats; ``columns`` and ``rows`` of the evidence; ``choices``, role -> the unit that
        ``derive`` chooses, and why.
    """
    run, losses = settings.run, []
    shape = settings.rows, settings.run_tokens
    batches = [batch_at(subject.training, seed, step, *shape) for step in range(run.steps)]

    def recorded(model: nn.Module, batch: Batch) -> Tensor:
        value = loss(model, batch)
        losses.append(round(value.item(), 4))
        return value

    averaged, _ = second_moments(subject.model, recorded, batches, run)
    layers = subject.layers()
    chosen = {name: v for name, v in averaged.items() if _number(layers[name]) % settings.moment_layers == 0}
    rows = evidence(subject.model, chosen, permutations=settings.permutations, seed=seed)
    derived = derive(rows).evidence
    assert derived is not None  # ``derive`` always gives its evidence.
    return {
        "losses": losses,
        "columns": list(COLUMNS),
        "rows": [
            [_value(dataclasses.asdict(row) | {"layer": layer_of(row.tensor)}, key) for key in COLUMNS] for row in rows
        ],
        "choices": {
            role: {"unit": choice["unit"], "why": choice["why"]}
            for role, choice in derived["choices"].items()
            if "candidates" in choice
        },
    }


def _number(layer: str) -> int:
    """Return the number of a layer; 0 outside of layers."""
    return int(layer.split()[1]) if layer.startswith("layer ") else 0


def _value(row: dict[str, Any], key: str) -> Any:
    return float(f"{row[key]:.6g}") if isinstance(row[key], float) else row[key]
