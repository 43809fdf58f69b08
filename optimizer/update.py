"""The step as a pure function over one tensor, in eager torch operations.

Tensors a step touches (d: the parameter's shape, a: its layout's aligned shape, which broadcasts against d):

    param       d   parameter's dtype          changed
    grad        d   any strides, expanded too  read once for v, once for m; never changed
    exp_avg     d   first moment               changed
    exp_avg_sq  a   fp32 (float64 for float64) changed; equal inside a run

Temporaries have the aligned shape: under one per mille of the parameter for every shared layout. Two exceptions. A
per-element layout has an aligned shape as large as the parameter, so it is worked through in pieces of its first
axis. And where the gradient has another dtype than the moment, torch's own casting inside the reduction and the
``lerp_`` may hold a copy of the tensor: at most one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .partition.layout import Layout

_PIECE = 1 << 16  # elements of a per-element temporary: small beside any tensor worth saving memory on


def second_moment_dtype(param: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 parameters: a bf16 second moment would never decay."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


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
        per_block = block_mean_square(grad.unflatten(0, (layout.fold, -1)), layout.unfolded())
        return per_block.flatten(0, 1)
    shape = layout.aligned_shape(grad.shape)
    reduced = [dim for dim, (kept, full) in enumerate(zip(shape, grad.shape, strict=True)) if kept != full]
    if reduced:
        # vector_norm reads the gradient once and needs no squared copy; squaring the root back costs one rounding.
        per_index = torch.linalg.vector_norm(grad, 2, dim=reduced, keepdim=True, dtype=dtype).contiguous()
        per_index.square_().div_(layout.numel_per_index(grad.shape))
    else:
        per_index = grad.to(dtype).square().contiguous()
    segments = layout.runs.segments
    if all(length == 1 for length, _ in segments):
        return per_index
    # Every other axis has size 1 or is a leading axis, so this view is the sequence of runs, once per leading index.
    flat = per_index.view(-1, layout.runs.repeat, layout.runs.total // layout.runs.repeat)
    start = 0
    for length, count in segments:
        segment = flat[..., start : start + length * count].unflatten(-1, (count, length))
        if length > 1:
            segment.copy_(segment.mean(-1, keepdim=True).expand_as(segment))
        start += length * count
    return per_index


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
    correction1 = 1 - beta1**step
    root_correction2 = math.sqrt(1 - beta2**step)
    for p, g, m, v, piece in _pieces(param, grad, exp_avg, exp_avg_sq, layout):
        v.mul_(beta2).add_(block_mean_square(g, piece), alpha=1 - beta2)
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        if m.dtype == g.dtype and not maximize:
            m.lerp_(g, 1 - beta1)
        else:
            m.mul_(beta1).add_(g, alpha=(beta1 - 1) if maximize else (1 - beta1))
        scale = v.sqrt().div_(root_correction2).add_(eps).reciprocal_().mul_(-lr / correction1)
        _add_scaled(p, m, scale)


def _add_scaled(p: Tensor, m: Tensor, scale: Tensor) -> None:
    """p += m * scale; where the dtypes differ, row by row pieces keep the promoted product small."""
    if p.dtype == m.dtype == scale.dtype or p.dim() == 0:
        p.add_(m * scale) if p.dtype != scale.dtype else p.addcmul_(m, scale)
        return
    rows = max(1, _PIECE * len(p) // p.numel())
    for start in range(0, len(p), rows):
        here = slice(start, start + rows)
        p[here].add_(m[here] * (scale[here] if len(scale) == len(p) else scale))


def _pieces(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Layout]]:
    """The tensors whole, or, under a per-element layout, in slices of their first axis that bound the temporaries.

    A layout with axis 0 split gets views with axis 0 split: splitting an axis never copies, whatever the strides.
    """
    if layout.fold > 1:
        param, grad, exp_avg, exp_avg_sq = (
            t.unflatten(0, (layout.fold, -1)) for t in (param, grad, exp_avg, exp_avg_sq)
        )
        layout = layout.unfolded()
    splits = param.dim() > 0 and param.numel() > max(_PIECE, param[0].numel())
    if not splits or exp_avg_sq.numel() != param.numel() or layout != Layout.per_element(tuple(param.shape)):
        yield param, grad, exp_avg, exp_avg_sq, layout
        return
    rows = max(1, _PIECE * len(param) // param.numel())
    for tensors in zip(*(t.split(rows) for t in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        yield (*tensors, Layout.per_element(tuple(tensors[0].shape)))
