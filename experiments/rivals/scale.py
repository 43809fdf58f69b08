"""SCALE: stochastic column-normalised gradients with last-layer momentum (arXiv 2506.16659), written from the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import Exact, Parts, adamw
from .rival import Group, Setup


class Scale(Exact):
    """Matrices move by their gradient over its RMS in each column; only the output layer has a first moment.

    A column belongs to one output of a layer: a row of ``nn.Linear.weight`` [outputs, inputs], and a column of
    ``nn.Embedding.weight`` [tokens, width]. The paper divides by the norm of a column, the authors' code by its RMS,
    which differs by a constant factor of the rate and is what happens here: updates have an RMS of 1, as Adam's nearly
    have. The decay of weights is decoupled, with 0 in the authors' scripts.

    Args:
        groups: groups of matrices with ``weight_decay``, ``embedding`` (whether their columns are axis 1) and
            ``momentum`` (the decay rate of a first moment, 0 for none).
        lr: learning rate.
    """

    def __init__(self, groups: list[Group], lr: float = 1e-3) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "embedding": False, "momentum": 0.0})

    def update(self, parameter: Tensor, grad: Tensor, group: Group) -> None:
        """Update one matrix."""
        # Every parameter has a state, or torch.distributed.checkpoint refuses to load the optimizer.
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            if group["momentum"]:
                state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        if group["momentum"]:
            grad = state["exp_avg"].lerp_(grad, 1 - group["momentum"])
        matrix = grad.flatten(1)
        rms = matrix.square().mean(0 if group["embedding"] else 1, keepdim=True).sqrt()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_((matrix / rms.clamp(min=1e-8)).view_as(parameter), alpha=-group["lr"])


def scale(setup: Setup) -> torch.optim.Optimizer:
    """Make SCALE for matrices, AdamW for vectors, with the run's beta1 as momentum."""
    output, embeddings = setup.output(), setup.embeddings() - setup.output()
    matrices, vectors = setup.split(setup.matrices())
    groups = []
    for group in matrices:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            own = {"params": [parameter], "param_names": [name], "embedding": name in embeddings}
            groups.append({**group, **own, "momentum": setup.betas[0] if name in output else 0.0})
    return Parts([(groups, Scale), (vectors, adamw(setup.betas))], setup.lr)
