"""The step as a pure function over one tensor, in eager torch operations.

The tensors of a step. Shape d is the parameter's shape. Shape a is the layout's aligned shape, which broadcasts
against d:

    param       d   parameter's dtype                    changed
    grad        d   any strides, also expanded           read once for v and once for m; never changed
    exp_avg     d   first moment                         changed
    exp_avg_sq  a   fp32 (float64 for a float64 param)   changed; equal inside a run

Temporaries have the aligned shape, which is under one per mille of the parameter where elements share a second moment.
Two cases need temporaries of the parameter's shape: a layout with one block per element, and
tensors of different dtypes, which are copied to the widest one. Those cases are computed in slices of ``SLICE``
elements. So are sums of squares that keep the axis along which the gradient is contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..partition.layout import Layout
from .dtypes import second_moment_dtype
from .hyper import corrections

SLICE = 3 << 14
"""Elements of a temporary of the parameter's shape on a CPU.

The time of small slices is spent in calls. Two threads share an operation only if it has more than 2^15 elements. In
larger slices the temporaries leave the cache.
"""


def block_mean_square(grad: Tensor, layout: Layout) -> Tensor:
    """Compute the mean of grad**2 over each block and repeat it at every index of the block.

    Args:
        grad: gradient, the layout's full shape.
        layout: the blocks of the parameter.

    Returns:
        Tensor of ``layout.aligned_shape(grad.shape)``, fp32 or float64.
    """
    dtype = second_moment_dtype(grad)
    if layout.fold > 1:
        return block_mean_square(layout.unfold(grad)[0], layout.unfolded()).flatten(0, 1)
    reduction = _reduction if torch.compiler.is_compiling() else _cached_reduction
    shape, reduced, count, shares = reduction(layout, grad.shape)
    if reduced:
        per_index = sum_of_squares(grad, shape, reduced, dtype).div_(count)
    else:
        per_index = grad.to(dtype).square().contiguous()
    if not shares:
        return per_index
    for runs in layout.segments(per_index):
        if runs.shape[-1] > 1:
            runs.copy_(runs.mean(-1, keepdim=True).expand_as(runs))
    return per_index


def _reduction(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int, bool]:
    """Describe how to reduce a gradient under a layout that is not folded.

    Returns:
        (aligned shape, axes to reduce, number of elements per index, whether any run is longer than one index).
    """
    aligned = layout.aligned_shape(shape)
    reduced = tuple(dim for dim, (size, full) in enumerate(zip(aligned, shape, strict=True)) if size != full)
    return aligned, reduced, layout.numel_per_index(shape), any(length > 1 for length, _ in layout.runs.segments)


# Cached, because this Python code runs right after a step has evicted the processor's caches and then takes several
# times longer.
_cached_reduction = functools.lru_cache(maxsize=4096)(_reduction)


def sum_of_squares(grad: Tensor, shape: tuple[int, ...], reduced: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the sums of grad**2 over the axes ``reduced``, which keep size 1.

    ``vector_norm`` reads the gradient once and needs no squared copy; squaring its result costs one more rounding.
    With another output dtype ``vector_norm`` copies its whole input, so such a gradient is reduced in slices. On a CPU
    it takes ten times as long as a squared copy and its sum if it has to add elements that are not neighbours.
    """
    apart = _apart(grad, reduced)
    if grad.dtype == dtype and not apart:
        return torch.linalg.vector_norm(grad, 2, dim=reduced, keepdim=True).contiguous().square_()
    sums = torch.zeros(shape, dtype=dtype, device=grad.device)
    for slice_of in slices_of(grad, limit_of(grad)):
        slice_of(sums).add_(_slice_sums(slice_of(grad), reduced, dtype, apart))
    return sums


def _slice_sums(part: Tensor, reduced: tuple[int, ...], dtype: torch.dtype, apart: bool) -> Tensor:
    """Return the sums of squares of one slice; its temporaries are freed before those of the next slice exist."""
    if not apart:
        return torch.linalg.vector_norm(part, 2, dim=reduced, keepdim=True, dtype=dtype).square_()
    squares = part.square() if part.dtype == dtype else part.to(dtype).square_()
    return squares.sum(reduced, keepdim=True)


def _apart(grad: Tensor, reduced: tuple[int, ...]) -> bool:
    """Whether a sum over the axes ``reduced`` adds elements that are not neighbours in a CPU's memory."""
    if grad.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    strides = {d: stride for d, stride in enumerate(grad.stride()) if grad.size(d) > 1}
    return bool(strides) and min(strides, key=strides.__getitem__) not in reduced


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
    """Take one Adam-mini step of one tensor, in place.

    Source: arXiv 2406.16793, Algorithm 1; the equations have the order of ``reference.reference_step``.

    Args:
        param: parameter; changed.
        grad: its gradient, same shape; not changed.
        exp_avg: first moment, same shape; changed.
        exp_avg_sq: second moment, shape ``layout.aligned_shape(param.shape)``; changed.
        layout: the blocks of the parameter.
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
    size, root = corrections(lr, beta1, beta2, step)
    keep = 1 - lr * weight_decay
    for p, g, m, v, window_layout in _windows(param, grad, exp_avg, exp_avg_sq, layout):
        v.mul_(beta2).add_(block_mean_square(g, window_layout), alpha=1 - beta2)
        scale = step_sizes(v, size, root, eps).neg_()
        move(p, g, m, scale, beta1=beta1, keep=keep if weight_decay else None, maximize=maximize)


def move(
    p: Tensor, g: Tensor, m: Tensor, scale: Tensor, *, beta1: float, keep: float | Tensor | None, maximize: bool
) -> None:
    """Update the first moment m, then the parameter p = keep * p + scale * m, in place.

    Args:
        p: parameter; changed.
        g: its gradient, same shape; not changed.
        m: first moment, same shape; changed.
        scale: factor of each first moment, broadcasts against ``p``; ``step_sizes`` with a negative sign.
        beta1: decay rate of the first moment, in [0, 1).
        keep: 1 - lr * weight_decay; None without weight decay.
        maximize: whether to ascend the gradient instead of descending it.
    """
    if p.dtype == g.dtype == m.dtype == scale.dtype:
        # This order reuses g, m and p of a small tensor while they are still in cache. Large tensors are not cut into
        # slices: in a measurement, slices of 2^17 elements or more took as long as the whole tensor, and smaller
        # slices took longer.
        _update_first_moment(m, g, beta1, maximize)
        if keep is not None:
            p.mul_(keep)
        p.addcmul_(m, scale)
        return
    for slice_of in slices_of(p, limit_of(p)):
        _update_in_widest_dtype(
            slice_of(p), slice_of(g), slice_of(m), slice_of(scale), beta1, 1.0 if keep is None else keep, maximize
        )


def step_sizes(exp_avg_sq: Tensor, size: float | Tensor, root: float, eps: float) -> Tensor:
    """Compute the factor of each first moment in the update: lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).

    Args:
        exp_avg_sq: second moment, aligned shape; not changed.
        size: lr / (1 - beta1^t), the first value that ``hyper.corrections`` returns.
        root: sqrt(1 - beta2^t), the second value that ``hyper.corrections`` returns.
        eps: added to the square root of the bias-corrected second moment.

    Returns:
        A new tensor, shape and dtype of ``exp_avg_sq``.
    """
    return exp_avg_sq.sqrt().add_(eps * root).reciprocal_().mul_(size * root)


def _update_first_moment(m: Tensor, g: Tensor, beta1: float, maximize: bool) -> None:
    """Set m = beta1 * m + (1 - beta1) * g in place, with -g instead of g to maximise."""
    if maximize:
        m.mul_(beta1).add_(g, alpha=beta1 - 1)
    else:
        m.lerp_(g, 1 - beta1)


def _update_in_widest_dtype(
    p: Tensor, g: Tensor, m: Tensor, scale: Tensor, beta1: float, keep: float | Tensor, maximize: bool
) -> None:
    """Update m and p in the wider dtype of ``m`` and ``scale``; each is rounded once, m before p uses it."""
    widest = torch.promote_types(m.dtype, scale.dtype)
    copy = g.to(widest, copy=True)
    if m.dtype == widest:
        first = m
        _update_first_moment(first, copy, beta1, maximize)
    else:
        first = m.to(widest)
        _update_first_moment(first, copy, beta1, maximize)
        m.copy_(first)
        first.copy_(m)
    copy.copy_(p).mul_(keep).addcmul_(first, scale)
    p.copy_(copy)


def limit_of(x: Tensor) -> int:
    """Return how many elements a temporary may have: all of ``x``'s on an accelerator and in compiled code.

    Slicing costs more than the memory is worth there: more kernel launches, or a longer graph.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.numel()
    return SLICE


def slices_of(x: Tensor, limit: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield functions that cut the same slice, of about ``limit`` elements, out of any tensor they are called with.

    The tensor must have the shape of ``x`` or broadcast to it.
    """
    if x.numel() <= limit or x.device.type != "cpu" or torch.compiler.is_compiling():
        yield lambda t: t
        return
    # The first axis of which a single index is small enough. Slices along it are the most contiguous ones.
    dim = next((d for d in range(x.dim()) if x.numel() <= limit * x.size(d)), max(range(x.dim()), key=x.size))
    rows = max(1, limit * x.size(dim) // x.numel())
    for start in range(0, x.size(dim), rows):
        size = min(rows, x.size(dim) - start)
        yield lambda t, start=start, size=size: t if t.size(dim) == 1 else t.narrow(dim, start, size)  # type: ignore[misc]


def _windows(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Layout]]:
    """Yield (param, grad, exp_avg, exp_avg_sq, layout) of the parts that are updated one after the other.

    Under a layout with one block per element the parts are slices of the first axis, which bounds the temporaries.
    Under every other layout the only part is the whole tensor. A folded layout splits axis 0 of every tensor; the split
    is a view for any strides.
    """
    param, grad, exp_avg, exp_avg_sq = layout.unfold(param, grad, exp_avg, exp_avg_sq)
    layout = layout.unfolded()
    whole = exp_avg_sq.numel() != param.numel() or param.dim() == 0
    if (
        whole
        or param.numel() <= max(limit := limit_of(param), param[0].numel())
        or (layout != Layout.per_element(tuple(param.shape)))
    ):
        yield param, grad, exp_avg, exp_avg_sq, layout
        return
    rows = max(1, limit * len(param) // param.numel())
    for tensors in zip(*(t.split(rows) for t in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        yield (*tensors, Layout.per_element(tuple(tensors[0].shape)))
