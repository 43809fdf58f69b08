"""Measure a model of one's own: second moments along a short AdamW run, and curvature by probing. No dense Hessian.

``python -m hessian derive`` is the command line.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.partition import Role, Rules, Unit, discover

from . import checks
from .derive import Evidence, block_gap, factored_gap
from .operators import HessianOperator
from .parts import WeightPart, weight_parts
from .probing import energy_inside

Loss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int, str], None]
LEAST = 10
"""Fewest second moments that an average is taken over."""
NATS = (0.0082, 0.0036, 0.0115)
"""Loss per unit of a role's Stein loss, in nats: at lr 3e-3, and the least and largest of four pairs of model and
corpus at 3e-3 and 1e-2. Fitted through zero to the single-role runs of docs/role_study.md after their outcome, without
the token embedding, whose cost no criterion predicts."""


@dataclass(frozen=True)
class Run:
    """A short AdamW run.

    Attributes:
        steps: number of steps.
        lr: peak learning rate; use the one that the model will be trained with.
        betas: decay rates of the moments.
        weight_decay: decoupled weight decay of tensors with two axes or more.
        warmup: share of the steps over which the rate rises linearly; then it falls linearly to 0.
        clip: limit of the gradient norm; 0 for none.
        every: steps between the second moments that are averaged.

    Raises:
        ValueError: a number is out of range, or fewer than ``LEAST`` second moments would be averaged.
    """

    steps: int = 200
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0
    every: int = 5

    def __post_init__(self) -> None:
        checks.at_least("steps", self.steps, 1)
        checks.at_least("every", self.every, 1)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr} must be positive and finite; use the rate that the model is trained with")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be in [0, 1); it is a share of the steps")
        if (taken := len(self.averaged())) < LEAST:
            needed = math.ceil(LEAST * self.every / (1 - self.warmup)) + self.every
            raise ValueError(
                f"steps={self.steps} gives {taken} second moments to average after the warm-up, at least {LEAST} are "
                f"needed: use steps={needed} or more, or a smaller every={self.every}"
            )

    def averaged(self) -> list[int]:
        """Return the steps, from 0, after which the second moments are taken."""
        return [step for step in range(self.steps) if step >= self.warmup * self.steps and step % self.every == 0]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (self.steps - step) / max(1.0, self.steps - rising)


def second_moments(
    model: nn.Module, loss: Loss, batches: Iterable[Any], run: Run, progress: Progress | None = None
) -> tuple[dict[str, Tensor], nn.Module]:
    """Train a copy of a model with AdamW and average Adam's second moments, with bias correction.

    Args:
        model: the model; it does not change. Its mode (train or eval) is that of the run.
        loss: ``loss(model, batch)`` -> 0-dim tensor, the mean over the batch.
        batches: what ``loss`` takes; begun anew when it ends before the run does.
        run: the run.
        progress: called with (steps done, steps in all, words).

    Returns:
        (name -> averaged second moment, in the parameter's shape, of every parameter that received gradients; the
        trained copy).

    Raises:
        ValueError: there are no batches, they end and cannot be begun anew, or the loss or a gradient is not finite.
        TypeError: the loss does not return a 0-dim tensor.
    """
    model = copy.deepcopy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameters; set requires_grad")
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, run.lr, run.betas, weight_decay=run.weight_decay)
    sums: dict[str, Tensor] = {}
    chosen = set(run.averaged())
    for step, batch in enumerate(itertools.islice(_endless(batches, run.steps), run.steps)):
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.dim():
            raise TypeError(f"the loss returned {checks.described(value)}")
        if not math.isfinite(value.item()):
            raise ValueError(f"the loss is {value.item()} at step {step + 1}; use a smaller lr than {run.lr}, or clip")
        value.backward()
        if run.clip:
            nn.utils.clip_grad_norm_(parameters.values(), run.clip, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if step in chosen:
            _add(sums, parameters, optimizer, run.betas[1])
        if progress is not None:
            progress(step + 1, run.steps, "AdamW run")
    return {name: total / len(chosen) for name, total in sums.items() if bool(total.any())}, model


def _endless(batches: Iterable[Any], wanted: int) -> Iterator[Any]:
    """Yield batches for ever, beginning anew at their end."""
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield batch
        if given == before:
            raise ValueError(
                f"batches ended after {given} of {wanted}; give at least one, in a list or a DataLoader, which can be "
                "begun anew, or fewer steps"
            )


def _add(
    sums: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, beta2: float
) -> None:
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):
            v = state["exp_avg_sq"].to(torch.float64) / (1 - beta2 ** float(state["step"]))
            sums[name] = sums[name] + v if name in sums else v


def evidence(
    model: nn.Module,
    moments: Mapping[str, Tensor],
    *,
    permutations: int = 20,
    seed: int = 0,
    name: str = "model",
    progress: Progress | None = None,
) -> list[Evidence]:
    """Compare every form of sharing that each weight matrix can have with the same form over shuffled second moments.

    The gate of ``derive`` is about v here, for blocks as for factored: z says how much better the form fits v than it
    fits v with its elements shuffled. Curvature does not decide; docs/role_study.md says why.

    Args:
        model: the model.
        moments: the result of ``second_moments``. Matrices that are missing are left out.
        permutations: number of shuffles, >= 2.
        seed: seed of the shuffles.
        name: what the rows call the model.
        progress: called with (matrices done, matrices in all, words).
    """
    checks.at_least("permutations", permutations, 2, "z needs a standard deviation")
    parts, rows = [part for part in weight_parts(model) if part.parameter in moments], []
    for number, part in enumerate(parts):
        v = part.of(moments[part.parameter])
        if not bool((v > 0).any()):
            continue  # an expert that no token reached
        forms: list[tuple[str, int, tuple[float, float, float]]] = [
            (unit, int(ids.max()) + 1, block_gap(v, ids, permutations, seed)) for unit, ids in part.candidates().items()
        ]
        if min(part.shape) > 1:
            forms.append((Unit.FACTORED.value, sum(part.shape), factored_gap(v, permutations, seed)))
        rows += [
            Evidence(name, part.name, part.role.value, unit, 1.0, v.numel(), scalars, 0.0, 0.0, z, 1.0, gap, null)
            for unit, scalars, (gap, null, z) in forms
        ]
        if progress is not None:
            progress(number + 1, len(parts), f"second moments of {part.name}")
    return rows


@dataclass(frozen=True)
class Energy:
    """How much of one weight matrix's Hessian lies inside blocks.

    Attributes:
        part: name of the matrix.
        unit: name of the unit whose blocks they are.
        share: squared Frobenius norm inside the blocks over that of the whole Hessian of the matrix.
        stderr: its standard error.
        by_size: the share of a matrix with equal entries, the sum of squared block sizes over n^2.
    """

    part: str
    unit: str
    share: float
    stderr: float
    by_size: float


def energies(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    parts: Sequence[WeightPart],
    *,
    probes: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Energy]:
    """Estimate by probing how much of each matrix's own Hessian block lies inside the blocks of every unit.

    Args:
        model: the model, in eval mode if it has dropout.
        loss: ``loss(model, batch)``.
        batches: few batches; the Hessian is that of their mean loss.
        parts: matrices that are whole parameters; parts of fused ones are left out.
        probes: probes per unit, >= 2; each takes two products.
        seed: seed of the probes.
        progress: called with (matrices done, matrices in all, words).
    """
    out, parameters = [], dict(model.named_parameters())
    for number, part in enumerate(parts):
        tensor = parameters[part.parameter]
        if part.index.numel() == tensor.numel():
            operator = HessianOperator(model, loss, {part.parameter: tensor}, batches)
            for unit, ids in part.candidates().items():
                if unit == Unit.TENSOR.value:
                    continue
                placed = torch.empty_like(ids).scatter_(0, part.index.flatten(), ids)
                inside, whole = energy_inside(operator, placed, probes, seed)
                total, n = float(whole.value), ids.numel()
                by_size = float(torch.bincount(ids).double().square().sum()) / n**2
                out.append(Energy(part.name, unit, float(inside.value) / total, float(inside.stderr) / total, by_size))
        if progress is not None:
            progress(number + 1, len(parts), f"curvature of {part.name}")
    return out


def unattainable(model: nn.Module, rules: Rules) -> dict[Role, str]:
    """Return the roles whose inputs a fused tensor cannot share as the rules ask: role -> name of the first tensor.

    Runs lie along one axis, so the parts of a fused tensor share inputs all together or not at all.
    """
    out: dict[Role, str] = {}
    for name, anatomy in discover(model).items():
        units = {part.role: rules[part.role] for part in anatomy.parts}
        chosen = set(units.values())
        alone = len(chosen) == 1 and anatomy.in_axis is not None
        if Unit.IN_NEURON in chosen and Unit.FACTORED not in chosen and not alone:
            for role, unit in units.items():
                if unit is Unit.IN_NEURON:
                    out.setdefault(role, name)
    return out


def predicted_cost(choices: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the loss that sharing is expected to cost, in nats: (estimate, low, high), summed over roles.

    The estimate is ``NATS`` times the sum of the chosen units' gaps, without the token embedding; low and high come
    from the least and largest slope that was measured. Models of 0.13M parameters after 150 steps gave the slopes.

    Args:
        choices: the entry ``choices`` of the evidence of derived rules.
    """
    total = sum(
        choice["predicted_cost"]
        for role, choice in choices.items()
        if "predicted_cost" in choice and role != Role.TOKEN_EMBEDDING.value
    )
    middle, low, high = (slope * total for slope in NATS)
    return middle, low, high
