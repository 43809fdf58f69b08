"""Rivals that a library has as they are: one class, the same for every parameter."""

from __future__ import annotations

import torch

from .installed import pytorch_optimizer
from .rival import Setup


def adafactor(setup: Setup) -> torch.optim.Optimizer:
    """Make torch's Adafactor: rank-one second moments, no first moment.

    torch's class always multiplies the rate by the RMS of each tensor (at least 1e-3), and limits it to 1 / sqrt(step);
    that limit does not act below lr = 0.05 in runs of 400 steps. Its default ``eps[0]`` is the float32 epsilon, 1.2e-7,
    and a lower bound of the mean of squared gradients over a tensor. The paper's constant is 1e-30. Gradients of a norm
    of 1 over a million parameters have a mean square of 1e-6 and fall from there, so the default would change the
    denominator of most tensors. Its square must be a float32 number, or rows that had no gradient give NaN: 1e-18.
    """
    return torch.optim.Adafactor(setup.groups, lr=setup.lr, eps=(1e-18, 1e-3), weight_decay=setup.weight_decay)


def sgd(setup: Setup) -> torch.optim.Optimizer:
    """Make torch's SGD with Nesterov momentum, without weight decay.

    torch's decay is an L2 penalty in the gradient. A decoupled one would be the rate times 0.1, and rates of SGD are a
    hundred times those of Adam: weights would shrink by a large share at every step.
    """
    return torch.optim.SGD(setup.undecayed(), lr=setup.lr, momentum=setup.betas[0], nesterov=True)


def lion(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's Lion with the paper's betas, and ten times the run's weight decay.

    The paper asks for a rate three to ten times below Adam's and a decay as many times above it, so that rate times
    decay stays the same.
    """
    groups = [{**group, "weight_decay": 10 * group["weight_decay"]} for group in setup.groups]
    return pytorch_optimizer().Lion(groups, lr=setup.lr, betas=(0.9, 0.99), weight_decouple=True)


def came(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's CAME: Adafactor with momentum, divided by how far updates are from it.

    beta3 is the paper's 0.9999, and none of its averages corrects its bias, as in the paper. In short runs the average
    of residuals is therefore far too small, and the first steps are large: at step t about 100 / sqrt(t) times the
    momentum over the residual. Vectors get no such division.
    """
    return pytorch_optimizer().CAME(setup.groups, lr=setup.lr, betas=(*setup.betas, 0.9999), weight_decouple=True)


def sm3(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's SM3-II with momentum: one accumulated maximum for each row and column.

    Its squares are summed over the run, not averaged. The library has no weight decay for it, and the paper none.
    """
    groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in setup.groups]
    return pytorch_optimizer().SM3(groups, lr=setup.lr, momentum=setup.betas[0])


def soap(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's SOAP: Adam in the eigenbasis of Shampoo's two matrices, renewed every 10 steps.

    The first step only gathers the matrices and changes no parameter, as in the authors' code. Vectors get Adam's step.
    """
    return pytorch_optimizer().SOAP(
        setup.groups, lr=setup.lr, betas=setup.betas, weight_decay=setup.weight_decay, precondition_frequency=10
    )
