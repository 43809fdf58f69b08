"""The step in tensor operations only: for autograd through the step, graph capture, and compilers.

The host reads no number from a device, and no value selects which operations run, so a captured graph is valid at every
step. Temporaries have the parameter's size unless a compiler fuses them. All other engines avoid such temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...partition.layout import Layout
from ..dtypes import second_moment_dtype
from ..hyper import Hyper, corrections


def traced_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    layout: Layout,
    hyper: Hyper,
    *,
    differentiable: bool = False,
) -> None:
    """Take one Adam-mini step of one tensor, in place (arXiv 2406.16793, Algorithm 1).

    Args:
        param: parameter; changed.
        grad: its gradient, same shape; not changed.
        exp_avg: first moment, same shape; changed.
        exp_avg_sq: second moment, shape ``layout.aligned_shape(param.shape)``; changed.
        step: number of steps taken before this one, 0-dim fp32 on any device; changed.
        layout: the blocks of the parameter.
        hyper: the group's hyper-parameters; lr and betas may be tensors, with ``requires_grad`` if ``differentiable``.
        differentiable: whether to keep the values that a backward pass through this step needs.
    """
    if param.numel() == 0:
        step.add_(1)
        return
    # A backward pass needs the old values, so the tensors that are written in place are read from copies.
    p, m, v = (t.clone() if differentiable else t for t in (param, exp_avg, exp_avg_sq))
    if hyper.grad_scale is not None:
        grad = grad / hyper.grad_scale
    if hyper.maximize:
        grad = -grad
    step.add_(1)
    t = step.to(torch.float64)  # in fp32, 1 - 0.999 has an error of 6e-5
    dtype = second_moment_dtype(param)
    grad = grad.to(dtype)
    first = hyper.beta1 * m.to(dtype) + (1 - hyper.beta1) * grad
    second = hyper.beta2 * v + (1 - hyper.beta2) * spread_mean_square(grad, layout)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    size, root = corrections(hyper.lr, hyper.beta1, hyper.beta2, t)
    factor = size / (second.sqrt() / root + hyper.eps)
    decayed = (1 - hyper.lr * hyper.weight_decay) * p.to(dtype)
    first, factor = layout.unfold(first, factor)
    param.copy_(decayed - (first * factor).reshape(param.shape))


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
