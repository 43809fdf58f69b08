"""Encode a tensor's layout and strides in the form that the native loop reads (``Layout`` in tensors.h)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ....partition.factored import FactoredLayout
from ....partition.layout import Layout
from ....partition.roles import viewed

_DENSE, _STRIDED, _FACTORED = 0, 1, 2


class _Dim(NamedTuple):
    """One axis of the tensors of a step.

    Attributes:
        size: number of indices.
        strides: stride in the parameter, the gradient, the first moment and the compensation, and in row-major order.
    """

    size: int
    strides: tuple[int, ...]

    def continues(self, other: _Dim) -> bool:
        """Whether ``other`` followed by this axis can be merged into one axis, in every tensor."""
        return all(a == b * self.size for a, b in zip(other.strides, self.strides, strict=True))


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of the tensor may share memory; also True for some unusual strides that do not overlap."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def encoded(layout: Layout, row: int, ordered: bool, tensors: Sequence[Tensor]) -> Tensor:
    """Encode a layout for the native loop.

    Args:
        layout: the blocks of the parameter.
        row: number of elements of a row of a quantised first moment; 0 for an unquantised one.
        ordered: whether the loop needs the row-major index of every element, for random numbers.
        tensors: parameter, gradient, first moment, compensation; the parameter replaces a first moment that is
            quantised and a compensation that does not exist.

    Returns:
        int64 tensor, one-dimensional.
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


def encoded_factored(layout: FactoredLayout, row: int, ordered: bool, tensors: Sequence[Tensor]) -> Tensor | None:
    """Encode a factored layout for the native loop; None if the loop does not support the strides of the tensors.

    Args:
        layout: the layout of the parameter.
        row: as in ``encoded``.
        ordered: as in ``encoded``.
        tensors: as in ``encoded``.

    Returns:
        int64 tensor, one-dimensional, which ``layout_at`` in tensors.h and ``Columns`` in factored.h decode; or None.
    """
    shape = viewed(tuple(tensors[0].shape), layout.fold)
    lead, axis = len(layout.leading), layout.axis
    order: list[int] | None = list(range(len(shape)))
    if not all(t.is_contiguous() for t in tensors):
        order = None if ordered else _shared_order(_dims(layout.rows, shape, tensors), lead)
    if order is None:
        return None
    at = order.index(axis)
    means = (*shape[:axis], layout.parts, *shape[axis + 1 :])
    strides = [prod(means[d + 1 :]) for d in range(len(shape))]
    axes: list[tuple[int, int]] = []  # (size, stride in the column means) of the axes of columns, in memory's order
    for d in (*order[lead:at], *order[at + 1 :]):
        if axes and axes[-1][1] == strides[d] * shape[d]:
            axes[-1] = (axes[-1][0] * shape[d], strides[d])
        elif shape[d] != 1:
            axes.append((shape[d], strides[d]))
    between, inner = prod(shape[d] for d in order[lead:at]), prod(shape[d] for d in order[at + 1 :])
    numbers = [_FACTORED, prod(shape[:lead]), between, shape[axis], inner, layout.repeat, row]
    numbers += [len(layout.segments), 0, 0, -1, *(n for pair in layout.segments for n in pair)]
    numbers += [layout.parts, strides[axis], len(axes), *(n for pair in axes for n in pair)]
    return torch.tensor(numbers, dtype=torch.int64)


def _dense(layout: Layout, outer: int, between: int, axis: int, inner: int, row: int) -> Tensor:
    """Encode tensors that are [outer][between][axis][inner] in memory."""
    repeat = layout.runs.repeat
    if layout.runs.segments == ((axis, 1),):  # one block per outer index, so the axes of the block can be merged
        between, inner = 1, between * inner
    if between == 1:
        outer, axis, repeat = 1, outer * axis, outer * repeat
    return _numbers(layout, _DENSE, (outer, between, axis, inner, repeat, row), (), (), 0)


def _strided(layout: Layout, shape: tuple[int, ...], dims: list[_Dim]) -> Tensor:
    """Encode tensors with arbitrary strides."""
    lead, axis = len(layout.leading), layout.axis
    rest = sorted((d for d in range(lead, len(shape)) if d == axis or shape[d] != 1), key=lambda d: -dims[d].strides[0])
    others: list[_Dim] = []
    axis_at = -1
    for d in rest:
        if d != axis and others and axis_at != len(others) - 1 and dims[d].continues(others[-1]):
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
    """Return the int64 tensor that ``layout_at`` in tensors.h decodes."""
    segments = layout.runs.segments
    numbers = [form, *sizes, len(segments), len(leading), len(others), axis_at]
    numbers += [n for pair in segments for n in pair]
    numbers += [n for dim in (*leading, *others) for n in (dim.size, *dim.strides)]
    return torch.tensor(numbers, dtype=torch.int64)


def _dims(layout: Layout, shape: tuple[int, ...], tensors: Sequence[Tensor]) -> list[_Dim]:
    """Return the axes of the tensors; a folded layout has axis 0 split in two."""
    strides = [_viewed_strides(t.stride(), shape[1] if layout.fold > 1 else 0) for t in tensors]
    strides.append(tuple(prod(shape[d + 1 :]) for d in range(len(shape))))
    return [_Dim(shape[d], tuple(s[d] for s in strides)) for d in range(len(shape))]


def _viewed_strides(strides: tuple[int, ...], split: int) -> tuple[int, ...]:
    """Return strides with axis 0 split into groups of ``split`` indices (0: not split); (1,) for a 0-dim tensor."""
    if split:
        return (strides[0] * split, *strides)
    return strides or (1,)


def _shared_order(dims: list[_Dim], lead: int) -> list[int] | None:
    """Return the order of the axes in memory if all tensors are dense in the same order, else None.

    The leading axes must come first. The order of all other axes is free, because a block contains all elements along
    the axes that are neither leading nor the axis of the runs.
    """
    large = [d for d in range(len(dims)) if dims[d].size != 1]
    order = sorted(large, key=lambda d: -dims[d].strides[0])
    expected = 1
    for d in reversed(order):
        if any(stride != expected for stride in dims[d].strides[:-1]):
            return None
        expected *= dims[d].size
    # Axes of size 1 can be at any position.
    leading = [d for d in large if d < lead]
    if order[: len(leading)] != leading:
        return None
    return [*range(lead), *order[len(leading) :], *(d for d in range(lead, len(dims)) if dims[d].size == 1)]
