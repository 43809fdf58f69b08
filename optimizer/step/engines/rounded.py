"""The eager step of tensors with a quantised first moment, and of bf16 parameters that have no fp32 copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ...partition.factored import FactoredLayout, TensorLayout
from ...partition.layout import Layout
from .. import moments
from ..factored import factored_means, factored_step_sizes, roots_of_parts
from ..hyper import Hyper, corrections
from ..places import Place
from ..update import block_mean_square, step_sizes

_CHUNK = 1 << 16  # elements per slice under a layout with one block per element, which bounds the temporaries


def rounded_update(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    layout: TensorLayout,
    hyper: Hyper,
    *,
    seed: int,
    rounding: str | None,
    place: Place | None = None,
) -> None:
    """Take one Adam-mini step of one tensor, in place; the caller has incremented the step counter.

    Source: arXiv 2406.16793, Algorithm 1. The modules ``moments`` and ``rounding`` specify how values are rounded.

    Args:
        param: parameter; changed.
        grad: its gradient, same shape, any strides; not changed.
        state: ``step``, ``exp_avg``, ``exp_avg_sq``; ``exp_avg_sq_col`` under a factored layout; ``exp_avg_scale`` if
            the first moment is quantised; ``compensation`` for "kahan". All but ``step`` are changed.
        layout: the layout of the parameter.
        hyper: the group's hyper-parameters.
        seed: the tensor's seed, uint32, for random rounding.
        rounding: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
        place: where the tensor lies in the whole one, if it is a shard.
    """
    if param.numel() == 0:
        return
    numbers, step = hyper.numbers(), int(state["step"])
    names = ("exp_avg", "exp_avg_scale", "compensation", "exp_avg_sq", "exp_avg_sq_col")
    tensors: list[Any] = [param, grad, *(state.get(name) for name in names)]
    if param.dim() == 0:
        tensors, layout = [None if t is None else t.unsqueeze(0) for t in tensors], Layout(0, [1])
    *tensors, second, columns = layout.unfold(*tensors)
    view, gradient = tensors[:2]
    factors = _factors(
        gradient,
        second,
        columns,
        layout.unfolded(),
        hyper,
        corrections(numbers["lr"], numbers["beta1"], numbers["beta2"], step),
    )
    for start, stop, factor in factors:
        p, g, m, s, c = (t if t is None or stop - start == len(view) else t[start:stop] for t in tensors)
        moments.move(
            p,
            g,
            m,
            s,
            factor,
            beta1=numbers["beta1"],
            decay=numbers["lr"] * numbers["weight_decay"],
            maximize=hyper.maximize,
            step=step,
            seed=seed,
            how=rounding,
            compensation=c,
            first_row=start,
            place=place,
        )


def _factors(
    grad: Tensor,
    second: Tensor,
    columns: Tensor | None,
    layout: TensorLayout,
    hyper: Hyper,
    correction: tuple[float, float],
) -> Iterator[tuple[int, int, Tensor]]:
    """Update the second moment and yield the factors of the first moment.

    Args:
        grad: gradient; not changed.
        second: ``exp_avg_sq``; changed.
        columns: ``exp_avg_sq_col`` under a factored layout; changed.
        layout: the layout of the gradient; ``fold`` must be 1.
        hyper: the group's hyper-parameters.
        correction: the result of ``hyper.corrections``.

    Yields:
        (start, stop, factor) of consecutive slices of axis 0. If every element has its own factor, a slice has few
        elements; otherwise there is a single slice.
    """
    (size, root), beta2, length = correction, float(hyper.beta2), len(grad)
    rows = max(1, _CHUNK * length // grad.numel())
    slices = [(start, min(start + rows, length)) for start in range(0, length, rows)]
    if isinstance(layout, FactoredLayout):
        assert columns is not None
        for moment, mean in zip((second, columns), factored_means(grad, layout), strict=True):
            moment.mul_(beta2).add_(mean, alpha=1 - beta2)
        both = roots_of_parts(second, columns, layout)
        for start, stop in slices:
            yield start, stop, factored_step_sizes(*both, layout, start, stop, size=size, root=root, eps=hyper.eps)
        return
    per_element = layout == Layout.per_element(tuple(grad.shape))
    for start, stop in slices if per_element else [(0, length)]:
        g, v = grad[start:stop], second if second.shape[0] != length else second[start:stop]
        slice_layout = Layout.per_element(tuple(g.shape)) if per_element else layout
        v.mul_(beta2).add_(block_mean_square(g, slice_layout), alpha=1 - beta2)
        yield start, stop, step_sizes(v, size, root, hyper.eps)
