"""Create the optimizer of an arm, and count its second-moment scalars. Rivals are in ``experiments.rivals``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from experiments.baselines import STATISTICS, PermutedAdamMini, StatisticAdamMini
from experiments.rivals import RIVALS, state_size
from optimizer import AdamMini, Rules, partition
from optimizer.partition.rules import shipped

if TYPE_CHECKING:
    from experiments.configs import TrainConfig

CONTROL = "permuted"
ADAMW = "torch_adamw"
EPS = 1e-8
"""AdamW's default eps."""
VARIANTS = {f"adam_mini_{statistic}": statistic for statistic in STATISTICS if statistic != "mean"}
"""Arms with the blocks of ``adam_mini`` and another statistic than the mean."""


def make_optimizer(
    model: nn.Module,
    arm: str,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    seed: int,
    eps: float = EPS,
) -> torch.optim.Optimizer:
    """Create the optimizer of an arm. Every arm gets the same two parameter groups.

    Args:
        model: the model to train.
        arm: a rule set's name or path, ``permuted`` (the control), ``torch_adamw``, or a key of ``VARIANTS`` or
            ``RIVALS``.
        lr: learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        weight_decay: decoupled weight decay.
        eps: added to the root of the second moment.
        seed: seed that shuffles the blocks of ``permuted``, and of the random numbers of rivals.

    Raises:
        ValueError: the arm is unknown; it is ``permuted``, one of ``VARIANTS`` or a rival, and the model is sharded; or
            a rival's library is not installed; or eps is not the default, for any of these.
    """
    if eps != EPS and (arm == CONTROL or arm in VARIANTS or arm in RIVALS):
        raise ValueError(f"eps={eps:g} is for AdamW and rule sets; arm={arm!r} has its own, so leave it at {EPS:g}")
    if arm in RIVALS:
        return RIVALS[arm].make(model, lr=lr, betas=betas, weight_decay=weight_decay, seed=seed)
    if arm == CONTROL or arm in VARIANTS:
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(f"arm={arm!r} gathers blocks by element, which cannot be sharded; use parallel='ddp'")
        if arm in VARIANTS:
            return StatisticAdamMini(model, VARIANTS[arm], lr, betas, weight_decay=weight_decay)
        return PermutedAdamMini(model, lr, betas, weight_decay=weight_decay, seed=seed)
    rules = load_rules("elementwise" if arm == ADAMW else arm)
    adam_mini = AdamMini(model, lr, betas, eps=eps, weight_decay=weight_decay, rules=rules)
    if arm == ADAMW:
        return torch.optim.AdamW(adam_mini.param_groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return adam_mini


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of a run.

    Raises:
        ValueError: as for ``make_optimizer``.
        RuntimeError: it does not have every trainable parameter once.
    """
    optimizer = make_optimizer(
        model,
        config.arm,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        eps=config.eps,
        seed=config.seed,
    )
    require_coverage(model, optimizer)
    return optimizer


def load_rules(arm: str) -> Rules:
    """Return the rule set of an arm.

    Raises:
        ValueError: the arm is neither a rule set, nor an existing file, nor the name of another arm.
    """
    try:
        return Rules.load(arm)
    except FileNotFoundError as error:
        others = ", ".join((CONTROL, ADAMW, *VARIANTS))
        raise ValueError(
            f"arm={arm!r} is no rule set ({', '.join(shipped())}), no path of one, none of {others}, and no rival "
            f"({', '.join(RIVALS)}); choose one of them"
        ) from error


def second_moment_scalars(model: nn.Module, arm: str, optimizer: torch.optim.Optimizer) -> int:
    """Return how many second-moment scalars an arm stores for a model's trainable parameters.

    For a rival, these are the values of its state that belong to no first moment, which may be none.
    """
    if arm in RIVALS:
        return state_size(optimizer).rest
    rules = {CONTROL: "adam_mini", ADAMW: "elementwise", **dict.fromkeys(VARIANTS, "elementwise")}.get(arm, arm)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return sum(layout.n_blocks for name, layout in partition(model, Rules.load(rules)).items() if name in trainable)


def require_coverage(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer has exactly the model's trainable parameters, each once.

    Raises:
        RuntimeError: it does not.
    """
    optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if len(optimized) != len(set(optimized)) or set(optimized) != trainable:
        raise RuntimeError(
            f"the optimizer holds {len(optimized)} parameters, the model has {len(trainable)} trainable ones; give it "
            "every trainable parameter once"
        )
