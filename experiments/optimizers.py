"""From an arm's name to an optimizer, and what its second moments cost."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from experiments.baselines import PermutedAdamMini
from optimizer import AdamMini, Rules, partition

CONTROL = "permuted"
ADAMW = "torch_adamw"


def make_optimizer(
    model: nn.Module, arm: str, *, lr: float, betas: tuple[float, float], weight_decay: float, seed: int
) -> torch.optim.Optimizer:
    """The optimizer of an arm: a rule set's name or path, ``permuted`` (the control) or ``torch_adamw``.

    Every arm sees the same two parameter groups. ``seed`` shuffles the control's blocks.

    Raises:
        ValueError: the control, for a sharded model.
    """
    if arm == CONTROL:
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(f"arm={arm!r} has blocks of random elements, which cannot be sharded; use parallel='ddp'")
        return PermutedAdamMini(model, lr, betas, weight_decay=weight_decay, seed=seed)
    ours = AdamMini(model, lr, betas, weight_decay=weight_decay, rules="elementwise" if arm == ADAMW else arm)
    if arm == ADAMW:
        return torch.optim.AdamW(ours.param_groups, lr=lr, betas=betas, weight_decay=weight_decay)
    return ours


def second_moment_scalars(model: nn.Module, arm: str) -> int:
    """How many second-moment scalars an arm keeps for a model's trainable parameters."""
    rules = {CONTROL: "adam_mini", ADAMW: "elementwise"}.get(arm, arm)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return sum(layout.n_blocks for name, layout in partition(model, Rules.load(rules)).items() if name in trainable)


def require_coverage(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds exactly the model's trainable parameters, each once.

    Raises:
        RuntimeError: it does not.
    """
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise RuntimeError(f"the optimizer holds {len(held)} parameters, the model has {len(wanted)} trainable ones")
