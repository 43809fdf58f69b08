"""One step of a tensor whose blocks other ranks share, once the blocks' mean squares are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..step.hyper import corrections
from ..step.update import step_sizes
from .geometry import Geometry
from .kinds import is_dtensor, local_of


def local_gradient(param: Tensor, where: Callable[[], str]) -> Tensor | None:
    """This rank's part of the gradient, placed as the parameter is.

    Sequence parallelism may leave a replicated parameter with a gradient that is still partial. It is summed here,
    as any optimizer has to: that message is the gradient's, not the optimizer's.

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
    """One Adam-mini step of a geometry, in place, on local tensors.

    Source: arXiv 2406.16793, Algorithm 1; the equations as in ``optimizer.step.update.adam_mini_update``.

    Args:
        geometry: what is held here.
        param: changed.
        grad: read only; None counts as zeros (another rank has a gradient for a block it shares with this one).
        exp_avg: changed.
        exp_avg_sq: ``geometry.aligned``, changed.
        means: mean squares of the local blocks.
        step, lr, beta1, beta2, eps, weight_decay, maximize: as in ``adam_mini_update``.
    """
    assert geometry.cut is not None
    if exp_avg_sq.numel() == 0:
        return  # nothing is held here, not even a value that others' elements share
    # Without a gradient of its own even a free part takes its step of zeros here.
    values = None if grad is None or geometry.cut.values is None else geometry.cut.values.to(exp_avg_sq.device)
    kept = exp_avg_sq if values is None else exp_avg_sq[values]
    slots = geometry.cut.blocks.at(values)
    fresh = means if slots is None else means[slots.to(means.device)]
    kept.mul_(beta2).add_(fresh.view(kept.shape).to(kept.device), alpha=1 - beta2)
    scale = step_sizes(kept, *corrections(lr, beta1, beta2, step), eps).neg_()
    if values is not None:
        exp_avg_sq[values] = kept
        rates, scale = scale, torch.empty_like(exp_avg_sq)
        scale[values] = rates
    if param.numel() == 0:
        return
    for part in geometry.boxes:
        if part.free and grad is not None:
            continue
        p, m = part.of(param), part.of(exp_avg)
        s = part.of_second(scale, tuple(p.shape))
        if grad is None:
            m.mul_(beta1)
        elif m.dtype == grad.dtype and not maximize:
            m.lerp_(part.of(grad), 1 - beta1)
        else:
            m.mul_(beta1).add_(part.of(grad), alpha=(beta1 - 1) if maximize else (1 - beta1))
        p, m, s = part.layout.unfold(p, m, s)
        if weight_decay and part.decays:
            p.mul_(1 - lr * weight_decay)
        if p.dtype == m.dtype == s.dtype:
            p.addcmul_(m, s)
        else:
            p.add_(m * s)
