"""Predict the cost of a rule set for a model from measured Jensen gaps, before any training.

    python -m experiments.studies.predicted_cost [--out results/predicted_cost.json]

The shipped rules ``derived_blocks`` contain the Jensen gap of every role and candidate unit, measured on the tiny
models. For every arm, this command averages the gaps over the matrices of the ablation's model, weighted by size. The
result is the mean over parameters of log(shared v) - log(element's v), which is twice the mean log ratio of learning
rates. Norms and vectors are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from torch import nn

from experiments.commandline import refusals
from experiments.configs import byte_llama
from experiments.grids import ARMS
from experiments.models import build
from experiments.optimizers import CONTROL
from experiments.storage import require_writable, write_json
from optimizer import Rules, Unit
from optimizer.partition import discover


class MissingEvidence(KeyError):
    """The evidence has no measured cost for some unit of the rules."""

    def __str__(self) -> str:
        return str(self.args[0])


def predicted_cost(model: nn.Module, arm: str, choices: Mapping[str, Any]) -> float:
    """Return the size-weighted mean Jensen gap of an arm over a model's matrices, in nats.

    Args:
        model: the model.
        arm: a rule set, or ``permuted``, whose gap is that of random blocks of ``adam_mini``'s sizes.
        choices: the entry ``choices`` of the evidence of derived rules.

    Raises:
        MissingEvidence: the evidence lacks a role or unit that the arm uses. It is a KeyError.
    """
    rules = Rules.load("adam_mini" if arm == CONTROL else arm)
    total = weight = 0.0
    for anatomy in discover(model).values():
        for part in anatomy.parts:
            if len(anatomy.shape) != 2:
                continue
            size = part.size * anatomy.shape[1 - anatomy.axis]
            weight += size
            unit = rules[part.role]
            if unit is Unit.ELEMENT:
                continue
            candidates = {c["unit"]: c for c in choices.get(part.role.value, {}).get("candidates", ())}
            # The rows of an embedding or output layer are its tokens, and the evidence has them as TOKEN.
            renamed = {"OUT_NEURON": "TOKEN"} if "TOKEN" in candidates else {}
            unit_name = renamed.get(unit.value, unit.value)
            if unit_name not in candidates:
                raise MissingEvidence(
                    f"arm={arm!r} gives {part.role.value} the unit {unit_name}, of which the evidence measured nothing "
                    f"(it has {sorted(candidates)}); run `make hessian`, then experiments.studies.hessian_maps.ship"
                )
            total += size * candidates[unit_name]["jensen_null" if arm == CONTROL else "jensen"]
    return total / weight


def main(out: Path = Path("results/predicted_cost.json")) -> None:
    """Write and print the predicted cost of every arm of the ablation.

    The cost of an arm with factored second moments is null, because the tiny models were not measured with them.

    Args:
        out: path of the JSON file.
    """
    model = build(byte_llama().model, 0)
    with refusals(ValueError, OSError, MissingEvidence):
        require_writable(out.parent, "out")
        choices = Rules("derived_blocks").evidence["choices"]
        predicted = [arm for arm in ARMS if not is_factored(arm)]
        costs = {arm: round(predicted_cost(model, arm, choices), 4) for arm in predicted}
    unknown = {arm: None for arm in ARMS if arm not in costs}
    write_json(out, {"model": "byte_llama", "unit": "nats", "cost": {**costs, **unknown}})
    for arm, cost in sorted(costs.items(), key=lambda item: item[1]):
        print(f"{arm:16s} {cost:.3f}")
    for arm in unknown:
        print(f"{arm:16s} not measured")


def is_factored(arm: str) -> bool:
    """Return whether an arm has factored second moments, of which the evidence has no measurement."""
    return arm != CONTROL and Unit.FACTORED in Rules.load(arm).units.values()


if __name__ == "__main__":
    tyro.cli(main)
