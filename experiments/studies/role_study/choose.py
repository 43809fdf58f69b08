"""Rules from the study's runs: for each role, the unit with the fewest scalars that costs no loss in any pair.

``python -m experiments.studies.role_study --rules`` writes the shipped set ``derived``. The rule of choice was written
before the runs that test it; see docs/role_study.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.studies.role_study.cells import ADAMW, FIT, LEARNING_RATES, MIXED, SEEDS, UNITS, Cell, arms, make_model
from experiments.studies.role_study.runs import load_cell
from optimizer import Role, Rules, Unit, partition
from optimizer.partition import discover

TOLERANCE = 1e-3
"""Nats by which the mean loss of a unit may exceed that of one scalar per element, in every pair."""
RATE = min(LEARNING_RATES)
"""The learning rate whose gaps choose. At the higher one, the gaps of one seed hardly rank like those of the others."""
PAIRS = (FIT, *MIXED)
"""The models and corpora whose gaps choose; the held-out pair takes no part."""
LIKE = {Role.EXPERT_IN: Role.MLP_IN, Role.EXPERT_OUT: Role.MLP_OUT}
"""Roles that the study's models lack, and the role whose unit they get."""
REST = "factored"
"""The shipped set that all other roles are taken from."""
SHIPPED = Path(__file__).resolve().parents[3] / "optimizer" / "partition" / "rules" / "derived.json"
_ARMS = {(Role.BIAS, Unit.TENSOR): "bias_tensor"}


def scalars(role: Role, unit: Unit) -> int:
    """Return how many second-moment scalars a role has under a unit, summed over the study's models."""
    total = 0
    for model in dict.fromkeys(name for name, _ in PAIRS):
        built = make_model(model, 0)
        layouts = partition(built, Rules("elementwise").replace("one role", {role: unit}))
        total += sum(layouts[name].n_blocks for name, anatomy in discover(built).items() if anatomy.role is role)
    return total


def gaps(folder: Path, role: Role, unit: Unit) -> dict[str, float]:
    """Return the mean gap of an arm over the seeds in every pair whose model has the role, in nats.

    Args:
        folder: results of the study, one JSON file per cell.
        role: the role that the arm changes.
        unit: the unit that it has.

    Returns:
        "model, corpus" -> mean over the seeds of the final loss minus AdamW's; infinite if a run diverged.

    Raises:
        ValueError: a run is missing, or AdamW diverged.
    """
    arm = _ARMS.get((role, unit), f"{role.value}/{unit.value}")
    found = {}
    for model, corpus in PAIRS:
        if arm not in arms(model):
            continue
        differences = []
        for seed in SEEDS:
            cell = Cell(model, corpus, RATE, seed)
            runs = load_cell(folder, cell)["runs"]
            if missing := {arm, ADAMW} - runs.keys():
                raise ValueError(f"{cell.name} lacks the runs {sorted(missing)}; run `make role-study` first")
            loss, base = (runs[name]["final_val_loss"] for name in (arm, ADAMW))
            if base is None:
                raise ValueError(f"{ADAMW} diverged in {cell.name}, so nothing can be compared with it")
            differences.append(float("inf") if loss is None else loss - base)
        found[f"{model}, {corpus}"] = statistics.fmean(differences)
    return found


def choice(folder: Path, role: Role) -> dict[str, Any]:
    """Return the unit of a role and its evidence: ``unit``, ``worst`` gap in nats, and all ``candidates``."""
    nothing = {"unit": Unit.ELEMENT.value, "scalars": scalars(role, Unit.ELEMENT), "gaps": {}, "worst": 0.0}
    candidates = [nothing]
    for unit in (Unit.TENSOR,) if role is Role.BIAS else UNITS[role]:
        measured = gaps(folder, role, unit)
        rounded = {pair: round(gap, 5) for pair, gap in measured.items()}
        worst = max(measured.values())
        candidates.append({"unit": unit.value, "scalars": scalars(role, unit), "gaps": rounded, "worst": worst})
    good = [candidate for candidate in candidates if candidate["worst"] <= TOLERANCE]
    chosen = min(good, key=lambda candidate: candidate["scalars"])
    for candidate in candidates:
        candidate["worst"] = round(candidate["worst"], 5)
    return {"unit": chosen["unit"], "worst": chosen["worst"], "candidates": candidates}


def choose(folder: Path) -> Rules:
    """Return the rules that the study's runs choose, with their evidence.

    Args:
        folder: results of the study.

    Raises:
        ValueError: a run is missing.
    """
    chosen = {role.value: choice(folder, role) for role in (*UNITS, Role.BIAS)}
    units = {role: Unit(chosen[role.value]["unit"]) for role in (*UNITS, Role.BIAS)}
    units |= {role: units[like] for role, like in LIKE.items()}
    rest = Rules(REST).units
    return Rules(
        "derived",
        {role: units.get(role, rest[role]) for role in Role},
        description=(
            "Chosen by training runs that change one role at a time: of the units that cost at most 0.001 nats against "
            "AdamW on two architectures and two corpora, the one with the fewest scalars. Experts are treated like "
            "the MLP. Convolutions, adapters and unrecognised matrices are factored; they were not measured. Biases "
            "were measured on one small GPT; constants of other layers that count as biases, as in state-space models, "
            "were not."
        ),
        evidence={"rule": {"tolerance": TOLERANCE, "lr": RATE, "seeds": list(SEEDS)}, "choices": chosen},
        provenance={"made_by": "experiments.studies.role_study", "pairs": [list(pair) for pair in PAIRS]},
    )
