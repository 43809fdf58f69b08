"""Adafactor with momentum as Zhai et al. train vision transformers (Scaling Vision Transformers, arXiv 2106.04560)."""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import Exact
from .rival import Group, Setup

CAP = 0.999
"""Upper limit of the decay rate of second moments, 1 - t**-0.8."""


class AdafactorZhai(Exact):
    """Rank-one second moments, an update clipped to an RMS of 1, then its momentum in bfloat16.

    The clipping is that of Adafactor's paper; the authors' code (big_vision) can clip and by default does not.
    No relative step and no scaling by the parameter's RMS. Weight decay is decoupled. Momentum is that of the clipped
    update (not of the gradient, as in Adam and in the rules ``factored`` of Adam-mini), without correction of its bias.
    pytorch_optimizer's ``AdaFactor`` multiplies the update by the learning rate before it enters the momentum, so that
    a rate acts for ten more steps; here, as in the authors' code, it multiplies the momentum.

    Args:
        groups: parameter groups with ``weight_decay``.
        lr: learning rate.
        beta1: decay rate of the momentum.
    """

    def __init__(self, groups: list[Group], lr: float, beta1: float = 0.9) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "weight_decay": 0.0})

    def update(self, parameter: Tensor, grad: Tensor, group: Group) -> None:
        """Update one parameter."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            if parameter.dim() < 2:
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            else:
                state["row"] = torch.zeros_like(parameter[..., 0])
                state["column"] = torch.zeros_like(parameter[..., 0, :])
        state["step"] += 1
        weight = max(1 - CAP, state["step"].item() ** -0.8)
        update = grad * _inverse_root(state, grad.square().add_(1e-30), weight)
        update /= update.square().mean().sqrt().clamp(min=1.0)
        momentum = state["exp_avg"].float().lerp_(update.float(), 1 - group["beta1"])
        state["exp_avg"].copy_(momentum)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(state["exp_avg"].to(parameter.dtype), alpha=-group["lr"])


def _inverse_root(state: dict[str, Tensor], squares: Tensor, weight: float) -> Tensor:
    """Update the second moments; return one over the square root of their rank-one approximation."""
    if "exp_avg_sq" in state:
        return state["exp_avg_sq"].lerp_(squares, weight).rsqrt()
    row, column = state["row"], state["column"]
    row.lerp_(squares.mean(-1), weight)
    column.lerp_(squares.mean(-2), weight)
    rows = (row / row.mean(-1, keepdim=True)).rsqrt()
    return rows.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def adafactor_zhai(setup: Setup) -> torch.optim.Optimizer:
    """Make it with the run's beta1 and weight decay."""
    return AdafactorZhai(setup.groups, setup.lr, setup.betas[0])
