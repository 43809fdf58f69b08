"""A criterion that looks at the loss: what one step of sharing costs, tried on AdamW's own trajectory.

Every criterion computed from second moments alone assumes that Adam's rates are right. This one does not. At some steps
of the AdamW run, each arm's step is taken from AdamW's weights, momentum and second moments, in the arm's role alone,
and the loss on other batches is compared with that after AdamW's step. The mean is the cost of sharing in nats per
step. It is negative where elements would do well to move faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from experiments.data import Corpus, batch_at
from experiments.models import lm_loss
from experiments.studies.role_study.cells import ADAMW, LENGTH, ROWS, STEPS, Cell, arms, make_model, shared
from experiments.studies.role_study.runs import BETAS, CLIP, WARMUP, WEIGHT_DECAY, rate
from optimizer import AdamMini, Role
from optimizer.partition import TensorLayout, discover, partition

EVERY, BATCHES = 15, 4
"""Steps between probes after the warm-up, and batches of each probe."""
TINY = 1e-300
"""Where no gradient has arrived, v and its shared value are zero, and so is the step."""
OTHER_BATCHES = 1_000_000
"""Added to the step of the probes' batches, so that no run trains on them."""


def probe(cell: Cell, corpus: Corpus) -> dict[str, float]:
    """Return the mean cost of one step of every arm that changes one role, in nats.

    Args:
        cell: the cell, whose AdamW run is repeated.
        corpus: its text.
    """
    model, rules = make_model(cell.model, cell.seed), arms(cell.model)
    optimizer = AdamMini(model, cell.lr, BETAS, weight_decay=WEIGHT_DECAY, rules=rules[ADAMW])
    layouts = {arm: partition(model, r) for arm, r in rules.items() if "/" in arm}
    parameters = dict(model.named_parameters())
    roles = {name: anatomy.role for name, anatomy in discover(model).items()}
    costs: dict[str, list[float]] = {arm: [] for arm in layouts}
    for step in range(STEPS):
        lm_loss(model, batch_at(corpus.train, cell.seed, step, ROWS, LENGTH)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(cell.lr, step)
        now = step >= WARMUP * STEPS and step % EVERY == 0
        before = {name: p.detach().clone() for name, p in parameters.items()} if now else {}
        optimizer.step()
        optimizer.zero_grad()
        if now:
            base = _loss(model, cell, corpus, step)
            for arm, of_arm in layouts.items():
                role = Role(arm.split("/")[0])
                names = [name for name in before if roles[name] is role]
                with shared_step(parameters, optimizer, before, {n: of_arm[n] for n in names}):
                    costs[arm].append(_loss(model, cell, corpus, step) - base)
    return {arm: sum(values) / len(values) for arm, values in costs.items()}


@torch.no_grad()
def _loss(model: nn.Module, cell: Cell, corpus: Corpus, step: int) -> float:
    first = OTHER_BATCHES + step * BATCHES
    batches = (batch_at(corpus.train, cell.seed, first + i, ROWS, LENGTH) for i in range(BATCHES))
    return sum(lm_loss(model, batch).item() for batch in batches) / BATCHES


@contextmanager
def shared_step(
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamMini,
    before: Mapping[str, Tensor],
    layouts: Mapping[str, TensorLayout],
) -> Iterator[None]:
    """Move the tensors of ``layouts`` to where sharing would have put them, and back to where AdamW did.

    Args:
        parameters: name -> parameter after AdamW's step.
        optimizer: the optimizer, with one second moment per element.
        before: name -> weights before the step.
        layouts: name -> layout of the tensors that share.
    """
    decays = {id(p): 1 - g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    after = {name: parameters[name].detach().clone() for name in layouts}
    with torch.no_grad():
        for name, layout in layouts.items():
            p = parameters[name]
            v = optimizer.state[p]["exp_avg_sq"].reshape(p.shape).to(torch.float64)
            decayed = before[name] * decays[id(p)]
            p.copy_(decayed + (v / shared(v, layout).clamp_min(TINY)).sqrt().to(p.dtype) * (p - decayed))
    yield
    with torch.no_grad():
        for name, weights in after.items():
            parameters[name].copy_(weights)
