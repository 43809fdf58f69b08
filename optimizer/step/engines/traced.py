"""The step in tensor operations only: for autograd through the step, graph capture, and compilers.

The host reads no number from a device, and no value selects which operations run, so a captured graph is valid at every
step. Temporaries have the parameter's size unless a compiler fuses them. All other engines avoid such temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...partition.factored import FactoredLayout, TensorLayout
from ...partition.layout import Layout
from ..dtypes import second_moment_dtype
from ..factored import per_row, roots_of_parts
from ..hyper import Hyper, corrections


def traced_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    layout: TensorLayout,
    hyper: Hyper,
    *,
    exp_avg_sq_col: Tensor | None = None,
    differentiable: bool = False,
) -> None:
    """Take one Adam-mini step of one tensor, in place (arXiv 2406.16793, Algorithm 1).

    Args:
        param: parameter; changed.
        grad: its gradient, same shape; not changed.
        exp_avg: first moment, same shape; changed.
        exp_avg_sq: second moment, shape ``layout.aligned_shape(param.shape)``; changed.
        step: number of steps taken before this one, 0-dim fp32 on any device; changed.
        layout: the layout of the parameter.
        hyper: the group's hyper-parameters; lr and betas may be tensors, with ``requires_grad`` if ``differentiable``.
        exp_avg_sq_col: means of columns under a factored layout; changed. None under any other layout.
        differentiable: whether to keep the values that a backward pass through this step needs.
    """
    skip = None if hyper.found_inf is None else hyper.found_inf.reshape(()).to(step.device) != 0
    step.add_(1 if skip is None else torch.where(skip, 0.0, 1.0))
    if param.numel() == 0:
        return
    # A backward pass needs the old values, so the tensors that are written in place are read from copies.
    p, m, v = (t.clone() if differentiable else t for t in (param, exp_avg, exp_avg_sq))
    if hyper.grad_scale is not None:
        grad = grad / hyper.grad_scale
    if hyper.maximize:
        grad = -grad
    t = step.to(torch.float64)  # in fp32, 1 - 0.999 has an error of 6e-5
    dtype = second_moment_dtype(param)
    grad = grad.to(dtype)
    first = hyper.beta1 * m.to(dtype) + (1 - hyper.beta1) * grad
    if isinstance(layout, FactoredLayout):
        assert exp_avg_sq_col is not None
        c = exp_avg_sq_col.clone() if differentiable else exp_avg_sq_col
        row_means, column_means = spread_factored_means(grad, layout)
        second = hyper.beta2 * v + (1 - hyper.beta2) * row_means
        columns = hyper.beta2 * c + (1 - hyper.beta2) * column_means
        _write(exp_avg_sq_col, columns, skip)
        root_of_second = factored_root(second, columns, layout)
    else:
        second = hyper.beta2 * v + (1 - hyper.beta2) * spread_mean_square(grad, layout)
        root_of_second = second.sqrt()
    _write(exp_avg, first, skip)
    _write(exp_avg_sq, second, skip)
    size, root = corrections(hyper.lr, hyper.beta1, hyper.beta2, t)
    factor = size / (root_of_second / root + hyper.eps)
    decayed = (1 - hyper.lr * hyper.weight_decay) * p.to(dtype)
    first, factor = layout.unfold(first, factor)
    _write(param, decayed - (first * factor).reshape(param.shape), skip)


def _write(target: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Copy new values, unless ``skip``, a 0-dim boolean on any device, is true."""
    target.copy_(new if skip is None else torch.where(skip.to(target.device), target, new.to(target.dtype)))


def spread_mean_square(grad: Tensor, layout: Layout) -> Tensor:
    """Compute the mean of grad**2 over each block and repeat it at every index of the block; no in-place operations.

    Args:
        grad: gradient, the layout's full shape.
        layout: the blocks of the parameter.

    Returns:
        Tensor of ``layout.aligned_shape(grad.shape)``, ``grad``'s dtype.
    """
    if layout.fold > 1:
        return spread_mean_square(layout.unfold(grad)[0], layout.unfolded()).flatten(0, 1)
    shape = layout.aligned_shape(grad.shape)
    reduced = [dim for dim, (size, full) in enumerate(zip(shape, grad.shape, strict=True)) if size != full]
    per_index = grad.square().mean(reduced, keepdim=True) if reduced else grad.square()
    if all(length == 1 for length, _ in layout.runs.segments):
        return per_index
    means = [
        runs.mean(-1, keepdim=True).expand_as(runs).flatten(-2) for runs in layout.segments(per_index.contiguous())
    ]
    return torch.cat(means, dim=-1).reshape(shape)


def spread_factored_means(grad: Tensor, layout: FactoredLayout) -> tuple[Tensor, Tensor]:
    """Compute ``step.factored.factored_means`` without in-place operations.

    Args:
        grad: gradient, the layout's full shape.
        layout: the layout of the parameter.
    """
    if layout.fold > 1:
        rows, columns = spread_factored_means(layout.unfold(grad)[0], layout.unfolded())
        return rows.flatten(0, 1), columns.flatten(0, 1)
    squares, axis, sizes = grad.square(), layout.axis, layout.part_sizes().clamp(min=1).tolist()
    sums = [torch.zeros_like(squares.narrow(axis, 0, 1)) for _ in range(layout.parts)]
    for part, start, length in layout.pieces():
        sums[part] = sums[part] + squares.narrow(axis, start, length).sum(axis, keepdim=True)
    means = torch.cat([total / size for total, size in zip(sums, sizes, strict=True)], dim=axis)
    return spread_mean_square(grad, layout.rows), means


def factored_root(rows: Tensor, columns: Tensor, layout: FactoredLayout) -> Tensor:
    """Return the square root of a factored second moment for every element, in a shape that ``layout.unfold`` splits.

    Args:
        rows: means of rows.
        columns: means of columns.
        layout: the layout of the parameter.
    """
    unfolded = layout.unfolded()
    rows, columns = layout.unfold(rows, columns)
    row_roots, column_roots = roots_of_parts(rows, columns, unfolded)
    root = row_roots * per_row(column_roots, unfolded)
    return root if layout.fold == 1 else root.flatten(0, 1)
