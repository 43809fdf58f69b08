"""The eager step of tensors with a quantised first moment, and of bf16 parameters that have no fp32 copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...partition.layout import Layout
from .. import moments
from ..hyper import Hyper, corrections
from ..update import block_mean_square, step_sizes

_CHUNK = 1 << 16  # elements per slice under a layout with one block per element, which bounds the temporaries


def rounded_update(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    layout: Layout,
    hyper: Hyper,
    *,
    seed: int,
    rounding: str | None,
) -> None:
    """Take one Adam-mini step of one tensor, in place; the caller has incremented the step counter.

    Source: arXiv 2406.16793, Algorithm 1. The modules ``moments`` and ``rounding`` specify how values are rounded.

    Args:
        param: parameter; changed.
        grad: its gradient, same shape, any strides; not changed.
        state: ``step``, ``exp_avg``, ``exp_avg_sq``; ``exp_avg_scale`` if the first moment is quantised;
            ``compensation`` for "kahan". All but ``step`` are changed.
        layout: the blocks of the parameter.
        hyper: the group's hyper-parameters.
        seed: the tensor's seed, uint32, for random rounding.
        rounding: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
    """
    if param.numel() == 0:
        return
    numbers, step = hyper.numbers(), int(state["step"])
    beta1, beta2, lr = numbers["beta1"], numbers["beta2"], numbers["lr"]
    size, root = corrections(lr, beta1, beta2, step)
    names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "compensation")
    tensors: list[Any] = [param, grad, *(state.get(name) for name in names)]
    if param.dim() == 0:
        tensors, layout = [None if t is None else t.unsqueeze(0) for t in tensors], Layout(0, [1])
    tensors, layout = layout.unfold(*tensors), layout.unfolded()
    view = tensors[0]
    per_element = layout == Layout.per_element(tuple(view.shape))
    rows = max(1, _CHUNK * len(view) // view.numel()) if per_element else len(view)
    for start in range(0, len(view), rows):
        p, g, m, v, s, c = (t if t is None or rows >= len(view) else t[start : start + rows] for t in tensors)
        slice_layout = Layout.per_element(tuple(p.shape)) if per_element else layout
        v.mul_(beta2).add_(block_mean_square(g, slice_layout), alpha=1 - beta2)
        factor = step_sizes(v, size, root, hyper.eps)
        moments.move(
            p,
            g,
            m,
            s,
            factor,
            beta1=beta1,
            decay=lr * numbers["weight_decay"],
            maximize=hyper.maximize,
            step=step,
            seed=seed,
            how=rounding,
            compensation=c,
            first_row=start,
        )
