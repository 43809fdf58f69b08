"""The step as a pure function over one tensor, in eager torch operations.

Tensors a step touches (d: the parameter's shape, a: its layout's aligned shape, which broadcasts against d):

    param       d   parameter's dtype          changed
    grad        d   any strides, expanded too  read once for v, once for m; never changed
    exp_avg     d   first moment               changed
    exp_avg_sq  a   fp32 (float64 for float64) changed; equal inside a run

Temporaries have the aligned shape: under one per mille of the parameter for every shared layout. Where that is the
parameter's own shape (a scalar per element), and where dtypes differ, so that the arithmetic needs wide copies, they
have the size of a slice, about 0.4 % of the tensor each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..partition.layout import Layout
from .dtypes import second_moment_dtype
from .hyper import corrections

_SMALLEST, _LARGEST, _SHARE = 1 << 13, 1 << 16, 8  # elements of a temporary: the tensor's, shifted by _SHARE, within


def block_mean_square(grad: Tensor, layout: Layout) -> Tensor:
    """Mean of grad**2 over each block, spread over the block's indices.

    Args:
        grad: gradient, the layout's full shape.
        layout: how it falls into blocks.

    Returns:
        Tensor of ``layout.aligned_shape(grad.shape)``, fp32 or float64.
    """
    dtype = second_moment_dtype(grad)
    if layout.fold > 1:
        return block_mean_square(layout.unfold(grad)[0], layout.unfolded()).flatten(0, 1)
    reduction = _reduction if torch.compiler.is_compiling() else _kept_reduction
    shape, reduced, count, shares = reduction(layout, grad.shape)
    if reduced:
        per_index = _sum_of_squares(grad, shape, reduced, dtype).div_(count)
    else:
        per_index = grad.to(dtype).square().contiguous()
    if not shares:
        return per_index
    for runs in layout.segments(per_index):
        if runs.shape[-1] > 1:
            runs.copy_(runs.mean(-1, keepdim=True).expand_as(runs))
    return per_index


def _reduction(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int, bool]:
    """(aligned shape, axes to reduce, elements per index, whether runs share) of a layout that is not folded."""
    aligned = layout.aligned_shape(shape)
    reduced = tuple(dim for dim, (kept, full) in enumerate(zip(aligned, shape, strict=True)) if kept != full)
    return aligned, reduced, layout.numel_per_index(shape), any(length > 1 for length, _ in layout.runs.segments)


# Kept: beside a step that has just emptied the processor's caches, Python costs several times what it does alone.
_kept_reduction = functools.lru_cache(maxsize=4096)(_reduction)


def _sum_of_squares(grad: Tensor, shape: tuple[int, ...], reduced: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums of grad**2 over some axes, which stay with size 1.

    vector_norm reads the gradient once and needs no squared copy; squaring the root back costs one rounding. Given
    another dtype it copies the whole gradient, so such a gradient goes through in slices.
    """
    if grad.dtype == dtype:
        return torch.linalg.vector_norm(grad, 2, dim=reduced, keepdim=True).contiguous().square_()
    sums = torch.zeros(shape, dtype=dtype, device=grad.device)
    for at in _slices(grad, _limit(grad)):
        part = torch.linalg.vector_norm(at(grad), 2, dim=reduced, keepdim=True, dtype=dtype)
        at(sums).add_(part.square_())
    return sums


def adam_mini_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: Layout,
    *,
    step: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One Adam-mini step of one tensor, in place.

    Source: arXiv 2406.16793, Algorithm 1; the equations in the order of ``reference.reference_step``.

    Args:
        param: parameter, changed.
        grad: its gradient, same shape, read only.
        exp_avg: first moment, same shape, changed.
        exp_avg_sq: second moment, ``layout.aligned_shape``, changed.
        layout: the parameter's blocks.
        step: steps taken, this one included.
        lr: learning rate; a 0-dim tensor is not synchronised.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added outside the root.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.
    """
    if param.numel() == 0:
        return
    size, root = corrections(lr, beta1, beta2, step)
    keep = 1 - lr * weight_decay
    for p, g, m, v, piece in _windows(param, grad, exp_avg, exp_avg_sq, layout):
        v.mul_(beta2).add_(block_mean_square(g, piece), alpha=1 - beta2)
        scale = step_sizes(v, size, root, eps).neg_()
        if p.dtype == g.dtype == m.dtype == v.dtype:
            # In this order a small tensor's g, m and p are each still in cache when they are needed again. Larger ones
            # in slices of any size from 2^17 elements on took as long, in smaller ones longer: measured.
            _advance(m, g, beta1, maximize)
            if weight_decay:
                p.mul_(keep)
            p.addcmul_(m, scale)
            continue
        for at in _slices(p, _limit(p)):
            _move_through_copies(at(p), at(g), at(m), at(scale), beta1, keep, maximize)


def step_sizes(exp_avg_sq: Tensor, size: float | Tensor, root: float, eps: float) -> Tensor:
    """What each first moment is multiplied by: lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), a new tensor.

    Args:
        exp_avg_sq: second moment, aligned.
        size: lr / (1 - beta1^t), as ``corrections`` returns it; likewise ``root``.
        root: sqrt(1 - beta2^t).
        eps: added outside the root.
    """
    return exp_avg_sq.sqrt().add_(eps * root).reciprocal_().mul_(size * root)


def _advance(m: Tensor, g: Tensor, beta1: float, maximize: bool) -> None:
    """The first moment: m = beta1 m +- (1 - beta1) g."""
    if maximize:
        m.mul_(beta1).add_(g, alpha=beta1 - 1)
    else:
        m.lerp_(g, 1 - beta1)


def _move_through_copies(
    p: Tensor, g: Tensor, m: Tensor, scale: Tensor, beta1: float, keep: float | Tensor, maximize: bool
) -> None:
    """The update in the widest of the dtypes: m and p are each rounded once, and p moves by the rounded m."""
    wide = torch.promote_types(m.dtype, scale.dtype)
    copy = g.to(wide, copy=True)
    if m.dtype == wide:
        first = m
        _advance(first, copy, beta1, maximize)
    else:
        first = m.to(wide)
        _advance(first, copy, beta1, maximize)
        m.copy_(first)
        first.copy_(m)
    copy.copy_(p).mul_(keep).addcmul_(first, scale)
    p.copy_(copy)


def _limit(x: Tensor) -> int:
    """Elements a temporary of the tensor may have; all of them where slicing costs more than memory does."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.numel()
    return min(max(x.numel() >> _SHARE, _SMALLEST), _LARGEST)


def _slices(x: Tensor, limit: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to take a slice of at most about ``limit`` elements, of tensors that have or broadcast to x's shape."""
    if x.numel() <= limit or x.device.type != "cpu" or torch.compiler.is_compiling():
        yield lambda t: t
        return
    # The first axis whose single index is small enough: slices along it are the most contiguous ones.
    dim = next((d for d in range(x.dim()) if x.numel() <= limit * x.size(d)), max(range(x.dim()), key=x.size))
    rows = max(1, limit * x.size(dim) // x.numel())
    for start in range(0, x.size(dim), rows):
        size = min(rows, x.size(dim) - start)
        yield lambda t, start=start, size=size: t if t.size(dim) == 1 else t.narrow(dim, start, size)  # type: ignore[misc]


def _windows(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Layout]]:
    """The tensors whole, or, under a per-element layout, in slices of their first axis that bound the temporaries.

    A layout with axis 0 split gets views with axis 0 split: splitting an axis never copies, whatever the strides.
    """
    param, grad, exp_avg, exp_avg_sq = layout.unfold(param, grad, exp_avg, exp_avg_sq)
    layout = layout.unfolded()
    whole = exp_avg_sq.numel() != param.numel() or param.dim() == 0
    if (
        whole
        or param.numel() <= max(limit := _limit(param), param[0].numel())
        or (layout != Layout.per_element(tuple(param.shape)))
    ):
        yield param, grad, exp_avg, exp_avg_sq, layout
        return
    rows = max(1, limit * len(param) // param.numel())
    for tensors in zip(*(t.split(rows) for t in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        yield (*tensors, Layout.per_element(tuple(tensors[0].shape)))
