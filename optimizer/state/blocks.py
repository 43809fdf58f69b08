"""Conversion of second moments from one partition to another, as means over blocks.

The second moment of a block is a moving average of the mean of g**2 over the block. The second moment under another
partition is therefore the mean of the old one over the elements of each new block. It is exact in expectation, and
exact if the new block is a union of old blocks. A new block inside an old one gets the old block's value, an
approximation that the next 1 / (1 - beta2) steps correct.

Old values are read a limited number of elements at a time, so no temporary tensor is as large as a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm, prod

import torch
from torch import Tensor

from ..partition.layout import Layout, Runs
from ..partition.roles import viewed

LEVEL = 1e-4  # relative tolerance for equality inside a block; values of different partitions differ by far more
_PIECE = 1 << 18  # elements of the old second moment read at a time; 2 MB in float64

Axes = tuple[Runs, ...]
"""A partition as the product of one sequence of runs per axis.

Two layouts of the same blocks may differ, but their ``Axes`` are equal.
"""


def each(size: int) -> Runs:
    """Return the runs of an axis in which every index is a run of its own."""
    return Runs(((1, size),))


def whole(size: int) -> Runs:
    """Return the runs of an axis whose indices form a single run."""
    return Runs(((size, 1),) if size else ())


def axes_of(layout: Layout, shape: Sequence[int]) -> Axes:
    """Return the blocks of a layout, axis by axis.

    Two layouts of a shape have the same blocks exactly if the results are equal.

    Args:
        layout: the layout of the tensor.
        shape: the tensor's shape.

    Raises:
        ValueError: a tensor of this shape cannot have this layout.
    """
    layout.require(shape)
    view, lead = viewed(tuple(shape), layout.fold), len(layout.leading)
    axes = [
        each(size) if axis < lead else layout.runs if axis == layout.axis else whole(size)
        for axis, size in enumerate(view)
    ]
    if layout.fold > 1:  # axis 0 of the tensor is the matrices of the view one after another
        inner = axes[1]
        axes[:2] = [Runs(inner.segments, inner.repeat * layout.fold)]
    return tuple(axes)


def spreads(aligned: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a second moment of shape ``aligned`` can belong to a tensor of shape ``shape``.

    Each axis must have the tensor's size or size 1. Axis 0 may also have any divisor of the tensor's size.
    """
    if len(aligned) != len(shape):
        return False
    if not shape:
        return True
    first = aligned[0] == shape[0] or (aligned[0] > 0 and shape[0] % aligned[0] == 0)
    return first and all(n in (1, size) for n, size in zip(aligned[1:], shape[1:], strict=True))


def rebuilt(v: Tensor, layout: Layout, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the second moment under another partition: the mean of ``v`` over each block of ``layout``.

    Args:
        v: second moment of a tensor of shape ``shape``, on any device, not changed. ``spreads(v.shape, shape)`` must
            be True.
        layout: the layout with the new blocks.
        shape: the tensor's shape.
        dtype: dtype of the result.

    Returns:
        A new tensor of ``layout.aligned_shape(shape)`` on the CPU.

    Raises:
        ValueError: ``v`` or the layout cannot belong to a tensor of this shape.
    """
    layout.require(shape)
    if not spreads(v.shape, shape):
        raise ValueError(f"a second moment of shape {tuple(v.shape)} cannot belong to a tensor of shape {tuple(shape)}")
    target = layout.aligned_shape(shape)
    out = torch.zeros(target, dtype=dtype)
    if prod(shape) == 0:
        return out
    means = v.detach()
    if shape:
        first = target[0] if v.shape[0] % target[0] == 0 else v.shape[0]
        reduced = (first, *(min(sizes) for sizes in zip(v.shape[1:], target[1:], strict=True)))
        means = resampled(_means(means, reduced), target[0])
    out.copy_(means.expand(target))
    if not is_level(out, layout):
        _level(out, layout)
    return out


def _means(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the means of ``v`` in a smaller shape: over axes of size 1, and over equal slices of axis 0."""
    if tuple(v.shape) == shape:
        return v
    total = torch.zeros(shape, dtype=torch.float64)
    reduced = [axis for axis in range(1, v.dim()) if shape[axis] != v.shape[axis]]
    for index in _index_slices(v.shape):
        values = v[index].to("cpu", torch.float64)
        if reduced:
            values = values.sum(reduced, keepdim=True)
        inner = (slice(0, 1) if axis in reduced else index[axis] for axis in range(1, v.dim()))
        where = (slice(None), *inner)
        total[where].index_add_(0, torch.arange(index[0].start, index[0].stop) * shape[0] // v.shape[0], values)
    return total.div_(v.numel() / total.numel())


def _index_slices(shape: Sequence[int], outer: tuple[slice, ...] = ()) -> Iterator[tuple[slice, ...]]:
    """Yield index tuples that cover a tensor, each with at most ``_PIECE`` elements unless one row has more."""
    axis = len(outer)
    if axis == len(shape):
        yield outer
        return
    inner = prod(shape[axis + 1 :])
    rows = max(1, min(shape[axis], _PIECE // max(1, inner)))
    for start in range(0, shape[axis], rows):
        yield from _index_slices(shape, (*outer, slice(start, min(start + rows, shape[axis]))))


def resampled(means: Tensor, cells: int) -> Tensor:
    """Resample axis 0 to ``cells`` values, each the mean over its share of the axis."""
    size = means.shape[0]
    if size in (1, cells):
        return means
    finest = lcm(size, cells)
    spread = means.repeat_interleave(finest // size, dim=0)
    return spread if finest == cells else spread.unflatten(0, (cells, -1)).mean(1)


def _level(v: Tensor, layout: Layout) -> None:
    """Set every index of a run to the run's mean, in place."""
    for segment in layout.segments(v):
        if segment.shape[-1] > 1:
            segment.copy_(segment.mean(-1, keepdim=True, dtype=torch.float64).expand_as(segment))


def is_level(v: Tensor, layout: Layout, tolerance: float = 0.0) -> bool:
    """Return whether the values of an aligned second moment are equal inside every run.

    Args:
        v: second moment in the layout's aligned shape.
        layout: the layout whose runs are compared.
        tolerance: relative tolerance. NaN counts as equal to everything.
    """
    if v.numel() == 0 or all(length == 1 for length, _ in layout.runs.segments):
        return True
    for segment in layout.segments(v.contiguous()):
        low, high = segment.aminmax(dim=-1)
        if bool((high - low > tolerance * high.abs()).any()):
            return False
    return True


def looks_coarser(v: Tensor, layout: Layout) -> bool:
    """Return whether the values of an aligned second moment suggest larger blocks than the layout's.

    Second moments of different blocks are not bitwise equal unless they are zero, except that two neighbours may be by
    chance, in a large vocabulary. The test is therefore whether three neighbouring blocks, or all blocks, have the same
    value.
    """
    if layout.n_blocks < 2 or v.numel() == 0:
        return False
    values = torch.cat([segment[..., 0] for segment in layout.segments(v.contiguous())], dim=-1).flatten()
    ties = (values[1:] == values[:-1]) & (values[1:] != 0)
    return bool(ties.all()) or bool((ties[1:] & ties[:-1]).any())
