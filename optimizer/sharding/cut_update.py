"""The update of a tensor that shares blocks with other ranks, once the mean squares of its blocks are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..step.hyper import corrections
from ..step.update import move, step_sizes
from .geometry import Geometry
from .kinds import is_dtensor, local_of


def local_gradient(param: Tensor, where: Callable[[], str]) -> Tensor | None:
    """Return this rank's shard of the gradient, with the parameter's placements; None if there is no gradient.

    Sequence parallelism may leave a replicated parameter with a partial gradient. Such a gradient is summed over its
    ranks first. Every optimizer needs this message, so it does not count as communication of Adam-mini.

    Args:
        param: a parameter, sharded or not.
        where: returns a description of the parameter for the error message.

    Raises:
        RuntimeError: only one of parameter and gradient is a DTensor.
    """
    grad = param.grad
    if grad is None:
        return None
    if is_dtensor(param) != is_dtensor(grad):
        raise RuntimeError(
            f"{where()} is a {type(param).__name__} and its gradient a {type(grad).__name__}; distribute both alike"
        )
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local_of(grad)


def cut_update(
    geometry: Geometry,
    param: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    means: Tensor,
    *,
    step: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Take one Adam-mini step of this rank's shard of a parameter, in place.

    Source: arXiv 2406.16793, Algorithm 1, with the equations of ``optimizer.step.update.adam_mini_update``.

    Args:
        geometry: the boxes and blocks of this rank's shard.
        param: the local parameter, shape ``geometry.shape``, updated in place.
        grad: the local gradient, same shape, read only. None counts as zeros: then only another rank has a gradient
            for a block that it shares with this rank.
        exp_avg: first moment, same shape, updated in place.
        exp_avg_sq: second moment, shape ``geometry.aligned``, updated in place.
        means: mean squared gradient of each local block over all ranks, [number of local blocks].
        step: number of steps taken, this one included.
        lr: learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
    """
    assert geometry.cut is not None
    if exp_avg_sq.numel() == 0:
        return  # this rank stores no element of the tensor and no value of its second moment
    # If this rank has no gradient, no engine steps its free boxes, so they are stepped here with a gradient of zeros.
    values = None if grad is None or geometry.cut.values is None else geometry.cut.values.to(exp_avg_sq.device)
    second = exp_avg_sq if values is None else exp_avg_sq[values]
    slots = geometry.cut.blocks.at(values)
    fresh = means if slots is None else means[slots.to(means.device)]
    second.mul_(beta2).add_(fresh.view(second.shape).to(second.device), alpha=1 - beta2)
    scale = step_sizes(second, *corrections(lr, beta1, beta2, step), eps).neg_()
    if values is not None:
        exp_avg_sq[values] = second
        rates, scale = scale, torch.empty_like(exp_avg_sq)
        scale[values] = rates
    if param.numel() == 0:
        return
    for box in geometry.boxes:
        if box.free and grad is not None:
            continue
        p, m = box.of(param), box.of(exp_avg)
        s = box.of_second(scale, tuple(p.shape))
        g = torch.zeros_like(p) if grad is None else box.of(grad)
        p, g, m, s = box.layout.unfold(p, g, m, s)
        keep = 1 - lr * weight_decay if weight_decay and box.decays else None
        move(p, g, m, s, beta1=beta1, keep=keep, maximize=maximize)
