"""The update of a tensor that shares blocks with other ranks, once the mean squares of its blocks are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..step.factored import factored_move, roots
from ..step.hyper import corrections
from ..step.update import move, step_sizes
from .columns import Columns
from .cut_rounded import ColumnMeans, Factors, Rounds, move_boxes, move_ranges
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
    state: Mapping[str, Any],
    means: Means,
    rounds: Rounds | None = None,
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
        state: the local state, updated in place: ``exp_avg``, same shape; ``exp_avg_sq``, shape ``geometry.aligned``;
            ``exp_avg_sq_col``, shape ``geometry.columns.shape``, if the second moment is factored; and, with
            ``rounds``, ``exp_avg_scale`` and ``compensation``.
        means: mean squared gradients over all ranks.
        rounds: how values are rounded if the first moment is quantised or a bf16 parameter has ``bf16_rounding``;
            None otherwise.
        step: number of steps taken, this one included.
        lr: learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
    """
    assert geometry.cut is not None
    exp_avg, exp_avg_sq, exp_avg_sq_col = (state.get(name) for name in ("exp_avg", "exp_avg_sq", "exp_avg_sq_col"))
    assert exp_avg is not None and exp_avg_sq is not None
    if exp_avg_sq.numel() == 0 and exp_avg_sq_col is None:
        return  # this rank stores no element of the tensor and no value of its second moment
    # If this rank has no gradient, no engine steps its free boxes, so they are stepped here with a gradient of zeros.
    values = None if grad is None or geometry.cut.values is None else geometry.cut.values.to(exp_avg_sq.device)
    second = exp_avg_sq if values is None else exp_avg_sq[values]
    slots = geometry.cut.blocks.at(values)
    fresh = means.blocks if slots is None else means.blocks[slots.to(means.blocks.device)]
    if second.numel():  # A rank without elements of a factored tensor may hold no row means, but column means.
        second.mul_(beta2).add_(fresh.view(second.shape).to(second.device), alpha=1 - beta2)
    size, root = corrections(lr, beta1, beta2, step)
    scale = step_sizes(second, size, root, eps)
    if values is not None:
        exp_avg_sq[values] = second
        rates, scale = scale, torch.empty_like(exp_avg_sq)
        scale[values] = rates
    columns: ColumnMeans | None = None
    if exp_avg_sq_col is not None:
        assert geometry.columns is not None
        described = geometry.columns if grad is None else geometry.columns.divided
        _update_columns(geometry.columns, described, exp_avg_sq_col, means, beta2)
        columns = ColumnMeans(described, exp_avg_sq_col, _mean_of_columns(described, exp_avg_sq_col, means, beta2))
    if param.numel() == 0:
        return
    if rounds is not None:
        factors = Factors(
            geometry, scale, exp_avg_sq, columns, lambda r: r.add_(eps * root).reciprocal_().mul_(size * root)
        )
        options: dict[str, Any] = {"beta1": beta1, "decay": lr * weight_decay, "maximize": maximize}
        rounded = move_boxes if rounds.flat is None else move_ranges
        rounded(geometry, param, grad, state, factors, rounds, step=int(step), **options)
        return
    scale.neg_()
    keep = 1 - lr * weight_decay if weight_decay else None
    if columns is not None:
        _step_factored(
            geometry,
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            columns,
            size=size,
            root=root,
            eps=eps,
            beta1=beta1,
            keep=keep,
            maximize=maximize,
        )
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
    columns: ColumnMeans,
    *,
    size: float | Tensor,
    root: float,
    eps: float,
    beta1: float,
    keep: float | Tensor | None,
    maximize: bool,
) -> None:
    """Update the elements of factored tensors, whose row and column means are updated already.

    Args:
        geometry: the shard.
        param: the local parameter; changed.
        grad: the local gradient; None counts as zeros.
        exp_avg: first moment; changed.
        exp_avg_sq: row means after the update.
        columns: column means after the update, of the tensors to step.
        size: first value that ``hyper.corrections`` returns.
        root: second value that ``hyper.corrections`` returns.
        eps: added to the square root of the bias-corrected second moment.
        beta1: decay rate of the first moment, in [0, 1).
        keep: 1 - lr * weight_decay; None without weight decay.
        maximize: ascend instead of descend.
    """
    for piece, own, mean in columns.pieces():
        box = geometry.boxes[piece.box]
        p, m = box.of(param), box.of(exp_avg)
        g = torch.zeros_like(p) if grad is None else box.of(grad)
        second = box.of_second(exp_avg_sq, tuple(p.shape))
        p, g, m, rows = (piece.rows(t) for t in box.layout.unfold(p, g, m, second))
        both = roots(rows, own, mean)
        decay = keep if box.decays else None
        factored_move(p, g, m, *both, size=size, root=root, eps=eps, beta1=beta1, keep=decay, maximize=maximize)


def _update_columns(every: Columns, moved: Columns, exp_avg_sq_col: Tensor, means: Means, beta2: float) -> None:
    """Update the column means of some factored tensors in place.

    Args:
        every: all factored tensors of the shard.
        moved: the tensors to update: all, or those that no engine updates.
        exp_avg_sq_col: column means; changed.
        means: mean squared gradients over all ranks.
        beta2: decay rate of the second moment, in [0, 1).
    """
    assert means.columns is not None
    fresh = means.columns.view(exp_avg_sq_col.shape).to(exp_avg_sq_col.device)
    if moved is every:
        exp_avg_sq_col.mul_(beta2).add_(fresh, alpha=1 - beta2)
        return
    for matrices in moved.matrices:
        matrices.of(exp_avg_sq_col).mul_(beta2).add_(matrices.of(fresh), alpha=1 - beta2)


def _mean_of_columns(columns: Columns, exp_avg_sq_col: Tensor, means: Means, beta2: float) -> Tensor:
    """Return the means over all columns, after the update.

    Args:
        columns: the tensors whose means to return.
        exp_avg_sq_col: column means after the update.
        means: mean squared gradients over all ranks.
        beta2: decay rate of the second moment, in [0, 1).
    """
    if means.all_columns is None or means.before is None:
        return columns.mean(exp_avg_sq_col)
    return (means.before * beta2).add_(means.all_columns, alpha=1 - beta2)
