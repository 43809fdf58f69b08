"""HiFT (arXiv 2401.15207): AdamW that updates one layer of the model in each step, written from the paper."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from .parts import Exact
from .rival import Group, Setup

_LAYER = re.compile(r"^(.*?\.\d+)\.")


class HiFT(Exact):
    """AdamW of one layer per step, from the first to the last, again and again ("bottom2up", one layer in a group).

    The others neither move nor update their moments, and bias correction counts a parameter's own updates. The paper
    keeps the moments of inactive layers on the host; here all exist from the first step on, because a checkpoint must
    have the same tensors at every step. The paper holds the learning rate constant while each layer has its turn; here
    each step has the schedule's rate. The trainer clips the norm of the whole gradient, the paper's that of the layer.

    Args:
        groups: parameter groups with ``weight_decay`` and ``layers``, the layer's number of each parameter.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, groups: list[Group], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "turn": 0})
        self._layers = 1 + max(number for group in self.param_groups for number in group["layers"])

    @property
    def active(self) -> int:
        """Number of the layer that the next step updates."""
        return int(self.param_groups[0]["turn"]) % self._layers

    def update_all(self) -> None:
        """Update the active layer."""
        active = self.active
        for group in self.param_groups:
            group["turn"] += 1
            for parameter, layer in zip(group["params"], group["layers"], strict=True):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if layer == active and parameter.grad is not None:
                    _adamw(parameter, parameter.grad, state, group)


def _adamw(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: Group) -> None:
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step = int(state["step"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))


def layers(setup: Setup) -> dict[str, int]:
    """Return the layer's number of each parameter: embeddings first, then the numbered blocks, then the rest.

    A model without numbered blocks has one layer for each module.
    """
    names, embeddings = setup.names(), setup.embeddings()
    numbered = any(_LAYER.match(name) for name in names)

    def label(name: str) -> str:
        if match := _LAYER.match(name):
            return match[1]
        if name in embeddings:
            return " embeddings"
        return "output" if numbered else name.rpartition(".")[0]

    order = list(dict.fromkeys(label(name) for name in names))
    first, last = " embeddings", "output"
    order = [x for x in order if x == first] + [x for x in order if x not in (first, last)]
    order += [last] if numbered and any(label(name) == last for name in names) else []
    return {name: order.index(label(name)) for name in names}


def hift(setup: Setup) -> torch.optim.Optimizer:
    """Make it with the run's betas and weight decay."""
    numbers = layers(setup)
    groups = [{**group, "layers": [numbers[name] for name in group["param_names"]]} for group in setup.groups]
    return HiFT(groups, setup.lr, setup.betas)
