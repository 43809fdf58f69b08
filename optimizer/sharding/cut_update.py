"""The update of a tensor that shares blocks with other ranks, once the mean squares of its blocks are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..step.factored import factored_move, roots
from ..step.hyper import corrections
from ..step.update import move, step_sizes
from .exchange import Means
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
    exp_avg_sq_col: Tensor | None,
    means: Means,
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
        exp_avg_sq_col: column means of a factored second moment, shape ``geometry.columns.shape``, updated in place;
            None if it is not factored.
        means: mean squared gradients over all ranks.
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
    fresh = means.blocks if slots is None else means.blocks[slots.to(means.blocks.device)]
    second.mul_(beta2).add_(fresh.view(second.shape).to(second.device), alpha=1 - beta2)
    size, root = corrections(lr, beta1, beta2, step)
    scale = step_sizes(second, size, root, eps).neg_()
    if values is not None:
        exp_avg_sq[values] = second
        rates, scale = scale, torch.empty_like(exp_avg_sq)
        scale[values] = rates
    keep = 1 - lr * weight_decay if weight_decay else None
    if exp_avg_sq_col is not None:
        _step_factored(
            geometry,
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            exp_avg_sq_col,
            means,
            size=size,
            root=root,
            eps=eps,
            beta1=beta1,
            beta2=beta2,
            keep=keep,
            maximize=maximize,
        )
    if param.numel() == 0:
        return
    for box in geometry.boxes:
        if box.factored or (box.free and grad is not None):
            continue
        p, m = box.of(param), box.of(exp_avg)
        s = box.of_second(scale, tuple(p.shape))
        g = torch.zeros_like(p) if grad is None else box.of(grad)
        p, g, m, s = box.layout.unfold(p, g, m, s)
        move(p, g, m, s, beta1=beta1, keep=keep if box.decays else None, maximize=maximize)


def _step_factored(
    geometry: Geometry,
    param: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_col: Tensor,
    means: Means,
    *,
    size: float | Tensor,
    root: float,
    eps: float,
    beta1: float,
    beta2: float,
    keep: float | Tensor | None,
    maximize: bool,
) -> None:
    """Update the column means, then the elements of factored tensors, whose row means are updated already.

    Args:
        geometry: the shard, with ``columns``.
        param: the local parameter; changed.
        grad: the local gradient; None counts as zeros.
        exp_avg: first moment; changed.
        exp_avg_sq: row means after the update.
        exp_avg_sq_col: column means; changed.
        means: mean squared gradients over all ranks.
        size: first value that ``hyper.corrections`` returns.
        root: second value that ``hyper.corrections`` returns.
        eps: added to the square root of the bias-corrected second moment.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        keep: 1 - lr * weight_decay; None without weight decay.
        maximize: ascend instead of descend.
    """
    columns = geometry.columns
    assert columns is not None and means.columns is not None
    fresh = means.columns.view(exp_avg_sq_col.shape).to(exp_avg_sq_col.device)
    exp_avg_sq_col.mul_(beta2).add_(fresh, alpha=1 - beta2)
    if means.all_columns is None or means.before is None:
        joined = columns.mean(exp_avg_sq_col)
    else:
        joined = (means.before * beta2).add_(means.all_columns, alpha=1 - beta2)
    for matrices, mean in zip(columns.matrices, columns.means(joined), strict=True):
        view = matrices.of(exp_avg_sq_col)
        for piece in matrices.pieces:
            box = geometry.boxes[piece.box]
            p, m = box.of(param), box.of(exp_avg)
            g = torch.zeros_like(p) if grad is None else box.of(grad)
            second = box.of_second(exp_avg_sq, tuple(p.shape))
            p, g, m, rows = (piece.rows(t) for t in box.layout.unfold(p, g, m, second))
            both = roots(rows, piece.columns(view), piece.columns(mean))
            decay = keep if box.decays else None
            factored_move(p, g, m, *both, size=size, root=root, eps=eps, beta1=beta1, keep=decay, maximize=maximize)
