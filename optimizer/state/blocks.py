"""Second moments from one partition to another, as means over blocks.

The second moment of a block follows the mean of g**2 over it. Its counterpart under another partition is therefore the
mean, over the elements of each new block, of the old second moment: exact in expectation, and exactly what the new
partition would have accumulated where its blocks are unions of old ones. Where a new block lies inside an old one, the
old value is all that is known of it: it is spread, an approximation that the next 1 / (1 - beta2) steps correct.

Nothing the size of a parameter is made along the way: old values are read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm, prod

import torch
from torch import Tensor

from ..partition.layout import Layout, Runs
from ..partition.roles import viewed

LEVEL = 1e-4  # relative: what counts as equal inside a block; partitions differ by far more
_PIECE = 1 << 18  # elements of the old second moment read at a time, as float64: 2 MB

Axes = tuple[Runs, ...]
"""A partition as the product of one sequence of runs per axis: the one spelling of each, whatever the layout's."""


def each(size: int) -> Runs:
    """Every index of an axis for itself."""
    return Runs(((1, size),))


def whole(size: int) -> Runs:
    """All indices of an axis together."""
    return Runs(((size, 1),) if size else ())


def axes_of(layout: Layout, shape: Sequence[int]) -> Axes:
    """The blocks of a layout, axis by axis; two layouts of a shape have the same blocks exactly when these agree.

    Args:
        layout: how the tensor falls into blocks.
        shape: the tensor's shape.

    Raises:
        ValueError: the shape cannot have this layout.
    """
    layout.require(shape)
    view, lead = viewed(tuple(shape), layout.fold), len(layout.leading)
    axes = [
        each(size) if axis < lead else layout.runs if axis == layout.axis else whole(size)
        for axis, size in enumerate(view)
    ]
    if layout.fold > 1:  # the pieces of axis 0 lie one behind the other
        inner = axes[1]
        axes[:2] = [Runs(inner.segments, inner.repeat * layout.fold)]
    return tuple(axes)


def spreads(aligned: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a second moment of shape ``aligned`` can belong to a tensor of this shape.

    Each axis is there whole or has size 1; axis 0 may also have one value per equal piece of the tensor's.
    """
    if len(aligned) != len(shape):
        return False
    if not shape:
        return True
    first = aligned[0] == shape[0] or (aligned[0] > 0 and shape[0] % aligned[0] == 0)
    return first and all(kept in (1, size) for kept, size in zip(aligned[1:], shape[1:], strict=True))


def rebuilt(v: Tensor, layout: Layout, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The second moment under another partition: the mean of ``v`` over each block of ``layout``.

    Args:
        v: second moment of a tensor of shape ``shape``; any shape that ``spreads`` over it, on any device, not changed.
        layout: the blocks to have.
        shape: the tensor's shape.
        dtype: of the result.

    Returns:
        A new tensor of ``layout.aligned_shape(shape)`` on the CPU.

    Raises:
        ValueError: ``v`` cannot belong to a tensor of this shape, or the layout cannot.
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
        kept = (first, *(min(sizes) for sizes in zip(v.shape[1:], target[1:], strict=True)))
        means = resampled(_means(means, kept), target[0])
    out.copy_(means.expand(target))
    if not is_level(out, layout):
        _level(out, layout)
    return out


def _means(v: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Means of v over the axes that ``kept`` gives size 1, and over equal pieces of axis 0, [kept]."""
    if tuple(v.shape) == kept:
        return v
    total = torch.zeros(kept, dtype=torch.float64)
    reduced = [axis for axis in range(1, v.dim()) if kept[axis] != v.shape[axis]]
    for index in _index_slices(v.shape):
        part = v[index].to("cpu", torch.float64)
        if reduced:
            part = part.sum(reduced, keepdim=True)
        inner = (slice(0, 1) if axis in reduced else index[axis] for axis in range(1, v.dim()))
        where = (slice(None), *inner)
        total[where].index_add_(0, torch.arange(index[0].start, index[0].stop) * kept[0] // v.shape[0], part)
    return total.div_(v.numel() / total.numel())


def _index_slices(shape: Sequence[int], outer: tuple[slice, ...] = ()) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cover a tensor, each of at most ``_PIECE`` elements."""
    axis = len(outer)
    if axis == len(shape):
        yield outer
        return
    inner = prod(shape[axis + 1 :])
    rows = max(1, min(shape[axis], _PIECE // max(1, inner)))
    for start in range(0, shape[axis], rows):
        yield from _index_slices(shape, (*outer, slice(start, min(start + rows, shape[axis]))))


def resampled(means: Tensor, cells: int) -> Tensor:
    """Axis 0 in ``cells`` equal pieces instead of as many as it has."""
    have = means.shape[0]
    if have in (1, cells):
        return means
    finest = lcm(have, cells)
    spread = means.repeat_interleave(finest // have, dim=0)
    return spread if finest == cells else spread.unflatten(0, (cells, -1)).mean(1)


def _level(v: Tensor, layout: Layout) -> None:
    """Give every index of a run the run's mean, in place."""
    for segment in layout.segments(v):
        if segment.shape[-1] > 1:
            segment.copy_(segment.mean(-1, keepdim=True, dtype=torch.float64).expand_as(segment))


def is_level(v: Tensor, layout: Layout, tolerance: float = 0.0) -> bool:
    """Whether an aligned second moment is equal inside every run, to a relative ``tolerance``; NaN counts as equal."""
    if v.numel() == 0 or all(length == 1 for length, _ in layout.runs.segments):
        return True
    for segment in layout.segments(v.contiguous()):
        low, high = segment.aminmax(dim=-1)
        if bool((high - low > tolerance * high.abs()).any()):
            return False
    return True


def looks_coarser(v: Tensor, layout: Layout) -> bool:
    """Whether an aligned second moment was kept for larger blocks than the layout's, judging by its values.

    Second moments of different blocks do not agree to the last bit unless they are zero; by chance two neighbours
    might, in a large vocabulary. So: three neighbouring blocks with one value, or all blocks with one.
    """
    if layout.n_blocks < 2 or v.numel() == 0:
        return False
    values = torch.cat([segment[..., 0] for segment in layout.segments(v.contiguous())], dim=-1).flatten()
    ties = (values[1:] == values[:-1]) & (values[1:] != 0)
    return bool(ties.all()) or bool((ties[1:] & ties[:-1]).any())
