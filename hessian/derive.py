"""Derive rules from measurements: for each role, choose the unit that shares one second-moment scalar.

Two numbers describe every candidate partition of a tensor.

*The lift* says whether the partition is visible in the Hessian H: how much more of |H| lies inside the blocks than
inside the blocks of a random partition of the same sizes. The z-score of that permutation null comes with it
(``structure.block_structure``).

*The Jensen gap* says what sharing costs: log(mean of v) - mean(log v) inside the blocks, where v is the second moment.
It is zero if v is constant in every block. Half of it is the mean log ratio between the learning rate that Adam would
use and the shared one, so it predicts the cost in the units of the optimizer.

Neither number suffices alone: v can vary inside blocks that contain all of |H|, and a finer partition always has a
smaller gap. The decision rule therefore uses the z-score as a gate and the gap to choose, and accepts a finer partition
only if its gap is clearly smaller. The rule was fixed before the training runs that test it.

*Factored* second moments are a candidate with numbers of their own. Their gap is Stein's loss (``sharing.stein``): for
blocks it is the Jensen gap, and it cannot be negative, as the mean log ratio of a rank-one product can. They have no
z-score in the Hessian, because no two elements share a scalar: there is no block whose mass could be counted. What they
claim is not that elements curve together but that v is a product of a row's and a column's share, as it is if the
squares of a layer's inputs and of its output gradients are uncorrelated. So their gate tests that claim: the z-score is
that of the gap against the same number of rows and columns fitted to v with its elements shuffled.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from optimizer.partition import Role, Rules, Unit

from . import sharing
from .checks import at_least
from .sharing import FLOOR

Z_GATE = 6.0
"""A candidate's structure counts as real if its median z over trained checkpoints exceeds this value."""
WORTH = 0.95
"""A finer candidate replaces a coarser one if its gap is at most this share of the coarser candidate's gap."""


@dataclass(frozen=True)
class Evidence:
    """One measurement: one tensor (or part of a fused one), one candidate unit, one checkpoint.

    Attributes:
        model: name of the model that was measured.
        tensor: the parameter's name; for a part of a fused tensor, the part's role follows it.
        role: name of the ``Role``.
        unit: name of the candidate ``Unit``.
        checkpoint: share of training done, 0 to 1.
        n_params: number of elements of the tensor.
        n_blocks: number of second-moment scalars of the candidate: blocks, or rows + columns.
        mass_inside: share of the off-diagonal |H| mass that lies inside the blocks; 0 for FACTORED.
        expected: mean of ``mass_inside`` over size-matched random partitions; 0 for FACTORED.
        z: (mass_inside - expected) in standard deviations over the random partitions; for FACTORED, that of
            ``factored_gap``.
        mean_ratio: mean |H| entry inside the blocks over the mean outside; 1 for FACTORED.
        jensen: Jensen gap of v under the candidate, in nats; for FACTORED, Stein's loss, which is the same for blocks.
        jensen_null: mean Jensen gap over size-matched random partitions, in nats; for FACTORED, that of shuffled v.
    """

    model: str
    tensor: str
    role: str
    unit: str
    checkpoint: float
    n_params: int
    n_blocks: int
    mass_inside: float
    expected: float
    z: float
    mean_ratio: float
    jensen: float
    jensen_null: float


@dataclass(frozen=True)
class Candidate:
    """A unit's evidence for one role, over tensors, models and trained checkpoints.

    Attributes:
        unit: name of the candidate ``Unit``.
        blocks_per_parameter: second-moment scalars per element.
        z: median z-score against the permutation null, in |H|; for FACTORED, in v.
        lift: median ratio of the mass inside the blocks to its expectation under the null; 1 for FACTORED.
        jensen: Jensen gap averaged over tensors, weighted by size; this is the predicted cost.
        jensen_null: Jensen gap of the null averaged over tensors, weighted by size.
        n: number of measurements.
    """

    unit: str
    blocks_per_parameter: float
    z: float
    lift: float
    jensen: float
    jensen_null: float
    n: int


def block_gap(v: Tensor, block_ids: Tensor, permutations: int = 20, seed: int = 0) -> tuple[float, float, float]:
    """Return the Jensen gap of second moments under a partition, and compare it with the same elements in random order.

    Args:
        v: second moments (mean squared gradients), any shape, non-negative.
        block_ids: int64, as many elements as v; the block of every element, numbered 0, 1, ...
        permutations: number of random partitions of the same sizes.
        seed: seed of the random partitions.

    Returns:
        (gap, mean gap of the random partitions, z): gaps are in nats, >= 0, and z is the number of standard deviations
        over the random partitions by which the gap is smaller than their mean; 0 if all of them have one gap, or if
        there is only one.

    Raises:
        TypeError: v or block_ids is not a tensor, or permutations is not an integer.
        ValueError: the sizes differ; a second moment is negative or not finite, or all are zero; the ids are not int64
            or skip a number; or permutations is below 1.
    """
    if not isinstance(v, Tensor) or not isinstance(block_ids, Tensor):
        raise TypeError(f"v is a {type(v).__name__}, block_ids a {type(block_ids).__name__}; both must be tensors")
    at_least("permutations", permutations, 1, "the null is a mean over random partitions")
    ids = block_ids.reshape(-1)
    flat = sharing.floored(v).reshape(-1)
    return _against_shuffles(flat, lambda w: sharing.log_gap(w, sharing.block_means(w, ids)), permutations, seed)


def jensen_gap(v: Tensor, block_ids: Tensor, permutations: int = 20, seed: int = 0) -> tuple[float, float]:
    """Return the first two numbers of ``block_gap``: the Jensen gap, and its mean over random partitions."""
    return block_gap(v, block_ids, permutations, seed)[:2]


def factored_gap(v: Tensor, permutations: int = 20, seed: int = 0) -> tuple[float, float, float]:
    """Return what factored second moments lose, and compare it with the same elements in random order.

    Args:
        v: second moments of a matrix, [rows, columns], non-negative.
        permutations: number of shuffles.
        seed: seed of the shuffles.

    Returns:
        (gap, mean gap of the shuffles, z), as of ``block_gap``; gaps are Stein's losses in nats, >= 0.

    Raises:
        TypeError: v is not a tensor, or permutations is not an integer.
        ValueError: v is not a matrix, a second moment is negative or not finite, all are zero, or permutations is
            below 2.
    """
    at_least("permutations", permutations, 2, "z needs a standard deviation")
    matrix = sharing.floored(v)
    if matrix.dim() != 2:
        raise ValueError(f"v has shape {tuple(v.shape)}; a factored second moment needs a matrix [rows, columns]")

    def gap(flat: Tensor) -> float:
        shaped = flat.reshape(matrix.shape)
        return sharing.stein(shaped, sharing.rank_one(shaped))

    return _against_shuffles(matrix.reshape(-1), gap, permutations, seed)


def _against_shuffles(
    flat: Tensor, gap: Callable[[Tensor], float], permutations: int, seed: int
) -> tuple[float, float, float]:
    """Return the gap of second moments, [n], the mean gap of their shuffles, and the z-score of the difference.

    Shuffling the elements is the same as shuffling the form of sharing over them.
    """
    generator = torch.Generator().manual_seed(seed)
    own = max(0.0, gap(flat))
    null = [gap(flat[torch.randperm(len(flat), generator=generator)]) for _ in range(permutations)]
    mean, spread = statistics.mean(null), statistics.stdev(null) if permutations > 1 else 0.0
    return own, mean, (mean - own) / spread if spread > 1e-12 * max(mean, 1.0) else 0.0


def derive(
    evidence: Sequence[Evidence],
    *,
    name: str = "derived",
    provenance: Any = None,
    without: Collection[Unit | tuple[Role, Unit]] = (),
) -> Rules:
    """Choose a unit for every role that has evidence.

    The choice for a role has two steps. First, candidates whose median z over trained checkpoints exceeds ``Z_GATE``
    are admitted; one scalar per tensor is always admitted, and if no candidate passes the gate, all are admitted. Then,
    starting from the fewest scalars, a finer candidate replaces a coarser one if its gap is at most ``WORTH`` times the
    coarser candidate's gap. Roles without evidence keep the unit that they have in ``adam_mini``.

    Args:
        evidence: measurements; those at checkpoint 0 are stored, but used for the choice only if there are no others.
        name: the rule set's name.
        provenance: how the measurements were made (seeds, models, versions); stored unchanged.
        without: units that must not be chosen, such as FACTORED, or pairs (role, unit) for single roles; their rows are
            stored and not used.

    Returns:
        Rules whose ``evidence`` contains the candidates, the choice and its reason for every role, and all rows.

    Raises:
        ValueError: there is no evidence that may be used, or a row has an unknown role or unit, no elements, no blocks,
            or a NaN.
    """
    if not evidence:
        raise ValueError("derive needs at least one Evidence row; `make hessian` measures them")
    _check(evidence)
    allowed = [
        row for row in evidence if Unit(row.unit) not in without and (Role(row.role), Unit(row.unit)) not in without
    ]
    if not allowed:
        raise ValueError(
            f"without={sorted(map(_barred, without))} leaves no row of evidence to choose from; leave fewer units out"
        )
    trained = [row for row in allowed if row.checkpoint > 0] or allowed
    units: dict[Role | str, Unit | str] = {}
    choices: dict[str, Any] = {}
    for role in dict.fromkeys(row.role for row in trained):
        candidates = _candidates([row for row in trained if row.role == role])
        chosen, why = _choose(candidates)
        units[role] = chosen.unit
        choices[role] = {
            "unit": chosen.unit,
            "predicted_cost": chosen.jensen,
            "why": why,
            "candidates": [asdict(candidate) for candidate in candidates],
        }
    for missing in (role.value for role in Role if role.value not in units):
        choices[missing] = {"unit": Rules("adam_mini")[Role(missing)].value, "why": "not measured: as in adam_mini"}
    return Rules(
        name,
        units,
        description="Chosen by the Hessian laboratory: permutation-null structure as the gate, Jensen gap as the cost.",
        evidence={
            "rule": {
                "z_gate": Z_GATE,
                "worth": WORTH,
                "floor": FLOOR,
                **({"without": sorted(map(_barred, without))} if without else {}),
            },
            "choices": choices,
            "table": [asdict(row) for row in evidence],
        },
        provenance=provenance,
    )


def _barred(unit: Unit | tuple[Role, Unit]) -> str:
    """Return a unit that must not be chosen in words."""
    return unit.value if isinstance(unit, Unit) else f"{unit[1].value} for {unit[0].value}"


def _check(evidence: Sequence[Evidence]) -> None:
    """Raise ValueError, naming the row and the field, if a row of evidence is not valid."""
    roles, units = {role.name for role in Role}, {unit.name for unit in Unit}
    for i, row in enumerate(evidence):
        where = f"evidence[{i}] ({row.model}, {row.tensor}, {row.unit})"
        for field, value, valid in (("role", row.role, roles), ("unit", row.unit, units)):
            if value not in valid:
                raise ValueError(f"{where} has {field}={value!r}; it must be one of {sorted(valid)}")
        if row.n_params < 1 or row.n_blocks < 1:
            raise ValueError(f"{where} has n_params={row.n_params}, n_blocks={row.n_blocks}; both must be at least 1")
        for field in ("z", "mass_inside", "expected", "jensen", "jensen_null", "checkpoint"):
            if not math.isfinite(getattr(row, field)):
                raise ValueError(f"{where} has {field}={getattr(row, field)}; leave the row out or measure it again")


def _candidates(rows: Sequence[Evidence]) -> list[Candidate]:
    """Combine the evidence for one role into one candidate per unit, fewest scalars first."""
    out = []
    for unit in dict.fromkeys(row.unit for row in rows):
        unit_rows = [row for row in rows if row.unit == unit]
        weight = sum(row.n_params for row in unit_rows)
        out.append(
            Candidate(
                unit=unit,
                blocks_per_parameter=sum(row.n_blocks for row in unit_rows) / weight,
                z=_median([row.z for row in unit_rows]),
                lift=_median([row.mass_inside / row.expected if row.expected > 0 else 1.0 for row in unit_rows]),
                jensen=sum(row.n_params * row.jensen for row in unit_rows) / weight,
                jensen_null=sum(row.n_params * row.jensen_null for row in unit_rows) / weight,
                n=len(unit_rows),
            )
        )
    return sorted(out, key=lambda candidate: candidate.blocks_per_parameter)


def _choose(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Apply the decision rule; return the chosen candidate and the reason in words."""
    passing = [c for c in candidates if c.z > Z_GATE]
    admitted = [c for c in candidates if c in passing or c.unit == Unit.TENSOR.value] if passing else list(candidates)
    chosen, steps = admitted[0], [f"{admitted[0].unit} (gap {admitted[0].jensen:.3f})"]
    for finer in admitted[1:]:
        better = finer.jensen <= WORTH * chosen.jensen
        steps.append(f"{finer.unit} (gap {finer.jensen:.3f}, z {finer.z:.1f}) {'taken' if better else 'not worth it'}")
        if better:
            chosen = finer
    dropped = [f"{c.unit} (z {c.z:.1f})" for c in candidates if c not in admitted]
    gate = f"dropped by the gate z > {Z_GATE:g}: {', '.join(dropped)}. " if dropped else ""
    if not passing:
        gate = f"no candidate passes the gate z > {Z_GATE:g}, so the gap alone decides. "
    return chosen, f"{gate}From the fewest scalars: {'; '.join(steps)}."


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])
