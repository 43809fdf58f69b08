"""A tensor's layout and strides as the loop reads them (``Layout`` in tensors.h)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ....partition.layout import Layout
from ....partition.roles import viewed

_DENSE, _STRIDED = 0, 1


class _Dim(NamedTuple):
    """One axis: its size, and the distance between neighbours in each tensor and in row-major order."""

    size: int
    strides: tuple[int, ...]  # parameter, gradient, first moment, compensation, row-major

    def behind(self, other: _Dim) -> bool:
        """Whether the two are one axis, ``other`` in front."""
        return all(a == b * self.size for a, b in zip(other.strides, self.strides, strict=True))


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of the tensor may share memory (also said of some exotic strides that do not overlap)."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def encoded(layout: Layout, row: int, ordered: bool, tensors: Sequence[Tensor]) -> Tensor:
    """A layout as the loop reads it.

    Args:
        layout: the parameter's blocks.
        row: elements of a row of a quantised first moment, else 0.
        ordered: whether the loop must know elements by their row-major index.
        tensors: parameter, gradient, first moment (or the parameter again, where it is quantised), compensation (or
            the parameter again).

    Returns:
        int64 tensor.
    """
    shape = viewed(tuple(tensors[0].shape), layout.fold) or (1,)
    lead, axis = len(layout.leading), layout.axis
    between, inner = prod(shape[lead:axis]), prod(shape[axis + 1 :])
    if not all(t.is_contiguous() for t in tensors):
        dims = _dims(layout, shape, tensors)
        order = None if ordered else _shared_order(dims, lead)
        if order is None:
            return _strided(layout, shape, dims)
        at = order.index(axis)
        between, inner = prod(shape[d] for d in order[lead:at]), prod(shape[d] for d in order[at + 1 :])
    return _dense(layout, prod(shape[:lead]), between, shape[axis], inner, row)


def _dense(layout: Layout, outer: int, between: int, axis: int, inner: int, row: int) -> Tensor:
    """Numbers of a tensor that is [outer][between][axis][inner] in memory."""
    repeat = layout.runs.repeat
    if layout.runs.segments == ((axis, 1),):  # one block an outer index: how it is cut makes no difference
        between, inner = 1, between * inner
    if between == 1:
        outer, axis, repeat = 1, outer * axis, outer * repeat
    return _numbers(layout, _DENSE, (outer, between, axis, inner, repeat, row), (), (), 0)


def _strided(layout: Layout, shape: tuple[int, ...], dims: list[_Dim]) -> Tensor:
    """Numbers of a tensor whose axes lie anyhow."""
    lead, axis = len(layout.leading), layout.axis
    rest = sorted((d for d in range(lead, len(shape)) if d == axis or shape[d] != 1), key=lambda d: -dims[d].strides[0])
    others: list[_Dim] = []
    axis_at = -1
    for d in rest:
        if d != axis and others and axis_at != len(others) - 1 and dims[d].behind(others[-1]):
            others[-1] = _Dim(others[-1].size * dims[d].size, dims[d].strides)
            continue
        if d == axis:
            axis_at = len(others)
        others.append(dims[d])
    between, inner = prod(shape[lead:axis]), prod(shape[axis + 1 :])
    sizes = (prod(shape[:lead]), between, shape[axis], inner, layout.runs.repeat, 0)
    return _numbers(layout, _STRIDED, sizes, dims[:lead], others, axis_at)


def _numbers(
    layout: Layout, form: int, sizes: tuple[int, ...], leading: Sequence[_Dim], others: Sequence[_Dim], axis_at: int
) -> Tensor:
    segments = layout.runs.segments
    numbers = [form, *sizes, len(segments), len(leading), len(others), axis_at]
    numbers += [n for pair in segments for n in pair]
    numbers += [n for dim in (*leading, *others) for n in (dim.size, *dim.strides)]
    return torch.tensor(numbers, dtype=torch.int64)


def _dims(layout: Layout, shape: tuple[int, ...], tensors: Sequence[Tensor]) -> list[_Dim]:
    """The axes of the view in which axis 0 is split."""
    strides = [_viewed_strides(t.stride(), shape[1] if layout.fold > 1 else 0) for t in tensors]
    strides.append(tuple(prod(shape[d + 1 :]) for d in range(len(shape))))
    return [_Dim(shape[d], tuple(s[d] for s in strides)) for d in range(len(shape))]


def _viewed_strides(strides: tuple[int, ...], split: int) -> tuple[int, ...]:
    """Strides of a tensor whose axis 0 is split, ``split`` indices a piece; of one without axes, of its one element."""
    if split:
        return (strides[0] * split, *strides)
    return strides or (1,)


def _shared_order(dims: list[_Dim], lead: int) -> list[int] | None:
    """The axes by their order in memory where all tensors are dense in one and the same, leading axes in front.

    A block is all of its axes but the run's and the leading ones, in any order; so an order of axes is as good as
    another.
    """
    large = [d for d in range(len(dims)) if dims[d].size != 1]
    order = sorted(large, key=lambda d: -dims[d].strides[0])
    expected = 1
    for d in reversed(order):
        if any(stride != expected for stride in dims[d].strides[:-1]):
            return None
        expected *= dims[d].size
    # Where an axis of one index stands makes no difference.
    leading = [d for d in large if d < lead]
    if order[: len(leading)] != leading:
        return None
    return [*range(lead), *order[len(leading) :], *(d for d in range(lead, len(dims)) if dims[d].size == 1)]
