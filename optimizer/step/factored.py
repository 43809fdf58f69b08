"""The step of a tensor with a factored second moment, in eager torch operations.

For a row i and a column j of a part, v_ij = r_i c_j / mean(r). The square root of v is computed as the product of
sqrt(r_i) and sqrt(c_j / mean(r)), because r_i c_j may overflow. The mean of r is computed as the mean of c, which is
equal: both average g**2 over the whole part.

If mean(r) is zero, so is v. If it is infinite, because a gradient was, v is infinite for the whole part: no finite
element of it moves, as in a block of Adam-mini.

The tensors of a step. Shape d is the parameter's shape, r is ``layout.aligned_shape`` and c ``layout.columns_shape``:

    param           d   parameter's dtype                     changed
    grad            d   any strides, also expanded            read twice for the means and once for m; never changed
    exp_avg         d   first moment                          changed
    exp_avg_sq      r   means of rows: fp32, or float64       changed
    exp_avg_sq_col  c   means of columns: fp32, or float64    changed
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout
from .dtypes import second_moment_dtype
from .hyper import corrections
from .update import block_mean_square, limit_of, move, slices_of, sum_of_squares


def factored_means(grad: Tensor, layout: FactoredLayout) -> tuple[Tensor, Tensor]:
    """Compute the means of grad**2 over the rows, and over the columns of every part.

    Args:
        grad: gradient, the layout's full shape.
        layout: the layout of the parameter.

    Returns:
        Tensors of ``layout.aligned_shape(grad.shape)`` and ``layout.columns_shape(grad.shape)``, fp32 or float64.
    """
    if layout.fold > 1:
        rows, columns = factored_means(layout.unfold(grad)[0], layout.unfolded())
        return rows.flatten(0, 1), columns.flatten(0, 1)
    return block_mean_square(grad, layout.rows), column_sums(grad, layout).div_(
        _along(layout.part_sizes(), grad, layout)
    )


def column_sums(grad: Tensor, layout: FactoredLayout) -> Tensor:
    """Compute the sums of grad**2 over the columns of every part.

    Args:
        grad: gradient, the layout's full shape.
        layout: the layout of the parameter; ``fold`` must be 1.

    Returns:
        Tensor of ``layout.columns_shape(grad.shape)``, fp32 or float64.
    """
    axis, dtype = layout.axis, second_moment_dtype(grad)
    sums = torch.zeros(layout.columns_shape(grad.shape), dtype=dtype, device=grad.device)
    for part, start, length in layout.pieces():
        target = sums.narrow(axis, part, 1)
        target.add_(sum_of_squares(grad.narrow(axis, start, length), tuple(target.shape), (axis,), dtype))
    return sums


def _along(values: Tensor, like: Tensor, layout: FactoredLayout) -> Tensor:
    """Return one value per part, at least 1, in a shape that broadcasts against column means."""
    shape = [-1 if dim == layout.axis else 1 for dim in range(like.dim())]
    return values.clamp(min=1).to(like.device, second_moment_dtype(like)).reshape(shape)


def roots(rows: Tensor, columns: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Factor the square root of v for one part: sqrt(v_ij) is the root of row i times the root of column j.

    Args:
        rows: means of rows, any shape that broadcasts with the others; not changed.
        columns: means of columns; not changed.
        mean: mean over all columns of the part.

    Returns:
        New tensors: the roots of rows and of columns.
    """
    return _row_roots(rows, mean), _column_roots(columns, mean)


def roots_of_parts(rows: Tensor, columns: Tensor, layout: FactoredLayout) -> tuple[Tensor, Tensor]:
    """Return ``roots`` of all parts of a tensor.

    Args:
        rows: means of rows, aligned shape; not changed.
        columns: means of columns, ``layout.columns_shape``; not changed.
        layout: the layout of the parameter; ``fold`` must be 1.

    Returns:
        New tensors: the roots of rows, aligned shape; and of columns, the shape of ``columns``.
    """
    mean = column_mean(columns, layout)
    return _row_roots(rows, per_row(mean, layout)), _column_roots(columns, mean)


def _row_roots(rows: Tensor, mean: Tensor) -> Tensor:
    return rows.masked_fill(mean == torch.inf, torch.inf).sqrt()


def _column_roots(columns: Tensor, mean: Tensor) -> Tensor:
    shares = columns / mean.masked_fill(mean == 0, 1)
    return shares.masked_fill(mean == torch.inf, torch.inf).sqrt()


def column_mean(columns: Tensor, layout: FactoredLayout) -> Tensor:
    """Return the mean over the columns of each part; axes that are neither leading nor ``layout.axis`` have size 1."""
    others = [dim for dim in range(len(layout.leading), columns.dim()) if dim != layout.axis]
    return columns.mean(others, keepdim=True) if others else columns  # no axes would mean all of them to torch


def per_row(columns: Tensor, layout: FactoredLayout) -> Tensor:
    """Return, for every index of the axis, the values of its part: a view that broadcasts if there is a single part."""
    if layout.parts == 1:
        return columns
    # Joined from views, because an index tensor would be copied to the device, which a graph capture does not allow.
    rows = []
    for part, _, length in layout.pieces():
        of_part = columns.narrow(layout.axis, part, 1)
        rows.append(of_part.expand(*of_part.shape[: layout.axis], length, *of_part.shape[layout.axis + 1 :]))
    return torch.cat(rows, dim=layout.axis) if rows else columns.narrow(layout.axis, 0, 0)


def factored_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_col: Tensor,
    layout: FactoredLayout,
    *,
    step: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Take one step of one tensor with a factored second moment, in place.

    Source: the equations and their order are those of ``reference.factored_reference_step``.

    Args:
        param: parameter; changed.
        grad: its gradient, same shape; not changed.
        exp_avg: first moment, same shape; changed.
        exp_avg_sq: means of rows, ``layout.aligned_shape(param.shape)``; changed.
        exp_avg_sq_col: means of columns, ``layout.columns_shape(param.shape)``; changed.
        layout: the layout of the parameter.
        step: number of steps taken, this one included.
        lr: learning rate; a 0-dim tensor is not read on the host.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay.
        maximize: whether to ascend the gradient instead of descending it.
    """
    if param.numel() == 0:
        return
    param, grad, exp_avg, exp_avg_sq, exp_avg_sq_col = layout.unfold(param, grad, exp_avg, exp_avg_sq, exp_avg_sq_col)
    layout = layout.unfolded()
    for second, mean in zip((exp_avg_sq, exp_avg_sq_col), factored_means(grad, layout), strict=True):
        second.mul_(beta2).add_(mean, alpha=1 - beta2)
    size, root = corrections(lr, beta1, beta2, step)
    keep = 1 - lr * weight_decay if weight_decay else None
    means = column_mean(exp_avg_sq_col, layout)
    for part, start, length in layout.pieces():
        p, g, m, rows = (t.narrow(layout.axis, start, length) for t in (param, grad, exp_avg, exp_avg_sq))
        columns, mean = (t.narrow(layout.axis, part, 1) for t in (exp_avg_sq_col, means))
        both = roots(rows, columns, mean)
        factored_move(p, g, m, *both, size=size, root=root, eps=eps, beta1=beta1, keep=keep, maximize=maximize)


def factored_move(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    row_roots: Tensor,
    column_roots: Tensor,
    *,
    size: float | Tensor,
    root: float,
    eps: float,
    beta1: float,
    keep: float | Tensor | None,
    maximize: bool,
) -> None:
    """Update the first moment and the parameter of one part, in place, in slices that bound the temporaries.

    Args:
        param: the part's rows of the parameter; changed.
        grad: its gradient, same shape; not changed.
        exp_avg: first moment, same shape; changed.
        row_roots: first result of ``roots``; broadcasts against ``param``.
        column_roots: second result of ``roots``; broadcasts against ``param``.
        size: lr / (1 - beta1^t), the first value that ``hyper.corrections`` returns.
        root: sqrt(1 - beta2^t), the second value that ``hyper.corrections`` returns.
        eps: added to the square root of the bias-corrected second moment.
        beta1: decay rate of the first moment, in [0, 1).
        keep: 1 - lr * weight_decay; None without weight decay.
        maximize: whether to ascend the gradient instead of descending it.
    """
    for slice_of in slices_of(param, limit_of(param)):
        scale = slice_of(row_roots) * slice_of(column_roots)
        scale = scale.add_(eps * root).reciprocal_().mul_(-size * root)
        move(slice_of(param), slice_of(grad), slice_of(exp_avg), scale, beta1=beta1, keep=keep, maximize=maximize)


def factored_step_sizes(
    row_roots: Tensor,
    column_roots: Tensor,
    layout: FactoredLayout,
    start: int,
    stop: int,
    *,
    size: float | Tensor,
    root: float,
    eps: float,
) -> Tensor:
    """Compute ``update.step_sizes`` for the indices [start, stop) of axis 0.

    Args:
        row_roots: first result of ``roots_of_parts``.
        column_roots: second result of ``roots_of_parts``.
        layout: the layout of the parameter; ``fold`` must be 1.
        start: first index of axis 0.
        stop: end of the indices, exclusive.
        size: lr / (1 - beta1^t), the first value that ``hyper.corrections`` returns.
        root: sqrt(1 - beta2^t), the second value that ``hyper.corrections`` returns.
        eps: added to the square root of the bias-corrected second moment.

    Returns:
        A new tensor of the slice's full shape.
    """
    rows = row_roots if row_roots.shape[0] == 1 else row_roots[start:stop]
    if layout.axis:
        columns = per_row(column_roots[start:stop], layout)
    elif layout.parts == 1:
        columns = column_roots
    else:
        columns = column_roots.index_select(0, layout.part_of_row()[start:stop].to(column_roots.device))
    return (rows * columns).add_(eps * root).reciprocal_().mul_(size * root)
