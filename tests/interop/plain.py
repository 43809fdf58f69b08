"""What every door must equal: a plain loop in one process over the averaged loss of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.text import batch, tiny_llama
from optimizer import AdamMini

OPTIONS: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
SAME = 1e-6
"""The largest difference of an fp32 weight that counts as none: the bar of every sharded case."""


def plain(
    ranks: int = 1,
    steps: int = 10,
    model: nn.Module | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: AdamMini(model, **OPTIONS),
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float = 1.0,
    accumulate: int = 1,
    size: int = 4,
) -> dict[str, Any]:
    """Losses and weights of a tiny Llama after ``steps``.

    Args:
        ranks: whose batches each step averages.
        steps: of the optimizer.
        model: another than the examples'.
        optimizer: made from the model.
        schedule: of the learning rate, stepped after each step.
        clip: of the gradient's norm.
        accumulate: batches of every rank in a step.
        size: sequences in a batch.
    """
    model = tiny_llama() if model is None else model
    model.train()
    opt = optimizer(model)
    rate = schedule(opt) if schedule else None
    losses = []
    for step in range(steps):
        opt.zero_grad()
        parts = [batch(step * accumulate + k, rank, ranks, size) for k in range(accumulate) for rank in range(ranks)]
        loss = torch.stack([model(input_ids=tokens, labels=tokens).loss for tokens in parts]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        if rate:
            rate.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": {name: w.detach().clone() for name, w in model.state_dict().items()}}


def made(rules: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return what makes AdamMini with the examples' options and these rules."""
    return lambda model: AdamMini(model, **OPTIONS, rules=rules)


def with_rules(rules: str, script: str) -> str:
    """Return a script (a path, or ``-m name``) as it is run with these rules; as it stands for the default ones."""
    return script if rules == "adam_mini" else f"-m tests.interop.with_rules {rules} {script}"


def case(rules: str) -> str:
    """Return what the name of a case says of the rules."""
    return "" if rules == "adam_mini" else f"; rules {rules}"


def apart(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any weight; both must have the same names."""
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    return max(float((got[name].double() - wanted[name].double()).abs().max()) for name in wanted)


def falls(losses: list[float], by: float = 0.5) -> str:
    """The loss at the start and at the end, which must be lower by this much (a frozen random model learns little)."""
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < first - by, f"the loss went from {first:.3f} to {last:.3f}"
    return f"loss {losses[0]:.2f} → {losses[-1]:.2f}"
