"""The column means of factored tensors that a flat tensor contains ranges of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout
from ..partition.roles import viewed
from .columns import Columns, Matrices, Piece, consecutive
from .geometry import Box

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .flat import Range


class _Dims(NamedTuple):
    """A factored tensor with its axes grouped: leading axes, axes up to the rows', rows, and axes behind them."""

    leads: int
    between: int
    rows: int
    inner: int

    @classmethod
    def of(cls, source: Range) -> _Dims:
        layout = source.layout
        view, lead = viewed(source.shape, layout.fold), len(layout.leading)
        return cls(prod(view[:lead]), prod(view[lead : layout.axis]), view[layout.axis], prod(view[layout.axis + 1 :]))

    @property
    def per_lead(self) -> int:
        """Number of elements of one leading index."""
        return self.between * self.rows * self.inner

    def held_leads(self, source: Range) -> range:
        """Return the leading indices with elements on this rank."""
        if source.start == source.stop:
            return range(0)
        return range(source.start // self.per_lead, -(-source.stop // self.per_lead))


def columns_size(source: Range) -> int:
    """Return the number of column means that this rank stores for a range; 0 if its layout is not factored."""
    if not isinstance(source.layout, FactoredLayout):
        return 0
    dims = _Dims.of(source)
    return len(dims.held_leads(source)) * dims.between * source.layout.parts * dims.inner


def held_columns(source: Range, whole: Tensor) -> Tensor:
    """Return the column means that this rank stores for a range, flattened, from those of the whole tensor."""
    dims = _Dims.of(source)
    held = dims.held_leads(source)
    return whole.reshape(dims.leads, -1)[held.start : held.stop].flatten()


def whole_box(box: Box, source: Range, first_column: int) -> Box:
    """Return a free box in place of that of a factored tensor, if the rank has all of it; else the box itself.

    Args:
        box: the box of the tensor's rows.
        source: the range of the tensor.
        first_column: index of its first column mean in the local column means.
    """
    layout = source.layout
    if not isinstance(layout, FactoredLayout) or not source.decays or source.stop - source.start != prod(source.shape):
        return box
    columns = (first_column, first_column + columns_size(source))
    view = viewed(source.shape, layout.fold)
    return replace(box, layout=layout.unfolded(), shape=view, free=True, columns=columns)


def flat_columns(
    ranges: Sequence[Range],
    boxes_of: Sequence[Sequence[tuple[Box, tuple[int, ...], tuple[int, ...]]]],
    boxes: Sequence[Box],
    group: ProcessGroup | None,
    device: torch.device,
) -> Columns | None:
    """Return the column means of a flat tensor, or None if none of its ranges is factored.

    Args:
        ranges: the ranges that the flat tensor contains.
        boxes_of: for each range, its boxes, each with the index of its first element and its shape in grouped axes.
        boxes: all boxes of the flat tensor; those of factored ranges are among them.
        group: process group whose ranks store the other elements; None if this rank has all of them.
        device: device on which the group communicates.
    """
    index = {id(box): k for k, box in enumerate(boxes)}
    matrices, slots, positions = [], [], []
    values = shared = means = 0
    for source, described in zip(ranges, boxes_of, strict=True):
        layout = source.layout
        if not isinstance(layout, FactoredLayout):
            continue
        dims, leads = _Dims.of(source), _Dims.of(source).held_leads(source)
        shape = (len(leads), dims.between, layout.parts, dims.inner)
        if described and described[0][0].free:
            box = described[0][0]
            assert isinstance(box.layout, FactoredLayout) and box.shape is not None
            matrices.append(Matrices.whole(box.layout, box.shape, values, index[id(box)], free=True))
        else:
            pieces = [
                piece
                for box, first, size in described
                for piece in _pieces(layout, dims, leads.start, index[id(box)], first, size, box.shape is None)
            ]
            sizes = layout.part_sizes().double().reshape(1, 1, -1, 1)
            matrices.append(Matrices(values, shape, 2, 1, sizes, layout.columns, tuple(pieces)))
        cut = _cut_leads(source, dims)
        per_lead = prod(shape[1:])
        for k, lead in enumerate(cut):
            if lead in leads:
                slots.append(values + (lead - leads.start) * per_lead + torch.arange(per_lead))
                positions.append(shared + k * per_lead + torch.arange(per_lead))
        values, shared, means = values + prod(shape), shared + len(cut) * per_lead, means + shape[0] * shape[2]
    if not matrices and not any(isinstance(r.layout, FactoredLayout) for r in ranges):
        return None
    nothing = torch.zeros(0, dtype=torch.int64)
    return Columns(
        shape=(values,),
        matrices=tuple(matrices),
        slots=torch.cat(slots) if slots else nothing,
        positions=torch.cat(positions) if positions else nothing,
        size=shared,
        mean_positions=torch.arange(means),
        mean_size=means,
        groups=(group,) if group is not None and shared else (),
        row_groups=(),
        device=device,
    )


def _cut_leads(source: Range, dims: _Dims) -> list[int]:
    """Return the leading indices whose elements are on several ranks, ascending."""
    bounds = {x for start, stop in source.bounds if start < stop for x in (start, stop)}
    return sorted({x // dims.per_lead for x in bounds if x % dims.per_lead})


def _pieces(
    layout: FactoredLayout,
    dims: _Dims,
    first_lead: int,
    box: int,
    first: tuple[int, ...],
    size: tuple[int, ...],
    one_axis: bool,
) -> list[Piece]:
    """Return the rows of each part in one box.

    Args:
        layout: the layout of the whole tensor.
        dims: its grouped axes.
        first_lead: first leading index whose column means this rank stores.
        box: index of the box.
        first: index of the box's first element. If ``dims.between`` is 1, leading axes and rows are one axis.
        size: shape of the box in the same axes.
        one_axis: whether the box's view has the axis of the rows only.
    """
    dim, parts, out = 0 if one_axis else 2, layout.part_of_row(), []
    inner = (3, first[3], size[3])
    if dims.between > 1:
        outer = ((0, first[0] - first_lead, size[0]), (1, first[1], size[1]))
        for part, start, count in consecutive(parts[first[2] : first[2] + size[2]]):
            out.append(Piece(box, dim, start, count, (*outer, (2, part, 1), inner), one_axis))
        return out
    rows = torch.arange(first[2], first[2] + size[2])
    for label, start, count in consecutive(rows // dims.rows * layout.parts + parts[rows % dims.rows]):
        lead, part = divmod(label, layout.parts)
        out.append(Piece(box, dim, start, count, ((0, lead - first_lead, 1), (1, 0, 1), (2, part, 1), inner), one_axis))
    return out
