"""The local geometry of 1-D tensors that contain ranges of flattened tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout, TensorLayout
from ..partition.layout import Layout, Runs
from ..partition.roles import viewed
from ..step.moments import quantises, row_axes
from .flat_columns import columns_size, flat_columns, whole_box
from .geometry import Blocks, Box, Cut, Geometry
from .holdings import Edges, local_runs, run_ids

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Range:
    """The elements of one flattened (row-major) tensor that each rank stores.

    Attributes:
        shape: shape of the whole tensor.
        layout: layout of the whole tensor.
        bounds: [start, stop) of every rank of the group, in the group's order; a rank with start == stop has none.
        rank: this rank's position in the group.
        offset: index of this rank's first element in the local 1-D tensor.
        decays: whether weight decay applies. False only for a tensor that is exempt from decay and was joined with
            tensors that decay.
        name: name of the tensor; empty if unknown.
    """

    shape: tuple[int, ...]
    layout: TensorLayout
    bounds: tuple[tuple[int, int], ...]
    rank: int
    offset: int = 0
    decays: bool = True
    name: str = ""

    @property
    def start(self) -> int:
        """Index of this rank's first element in the flattened tensor."""
        return self.bounds[self.rank][0]

    @property
    def stop(self) -> int:
        """Index after this rank's last element in the flattened tensor."""
        return self.bounds[self.rank][1]


@dataclass(frozen=True)
class FlatLayout:
    """The layout of a 1-D tensor that contains ranges of flattened tensors.

    It has the methods of ``Layout`` that the optimizer calls; ``AnyLayout`` is either of the two.

    Attributes:
        ranges: the ranges that the tensor contains.
        numel: number of elements of the local tensor.
        group: name of the process group whose ranks store the other elements; empty if this rank has all of them.
        advice: the next action for error messages, if the tensor no longer has ``numel`` elements.
    """

    ranges: tuple[Range, ...]
    numel: int
    group: str
    advice: str = field(default="", compare=False)

    def _key(self) -> tuple[object, ...]:
        return self.ranges, self.numel, self.group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"FlatLayout(ranges={self.ranges}, numel={self.numel}, group={self.group!r})"

    @property
    def n_blocks(self) -> int:
        """Number of blocks of all whole tensors that the ranges belong to."""
        return sum(r.layout.n_blocks for r in self.ranges)

    def fits(self, shape: Iterable[int]) -> bool:
        """Return whether a tensor of this shape can have this layout."""
        return tuple(shape) == (self.numel,)

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Raise ValueError, with both sizes, if a tensor of this shape cannot have this layout."""
        if not self.fits(shape):
            advice = f"; {self.advice}" if self.advice else ""
            raise ValueError(
                f"{what} has shape {tuple(shape)}, but this rank was given {self.numel} elements of it{advice}"
            )

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the local second moment. It does not depend on ``shape``."""
        return (sum(_second_moment_size(r) for r in self.ranges),)

    def columns_shape(self, shape: Iterable[int]) -> tuple[int, ...] | None:
        """Return the shape of the local column means, or None if no range is factored."""
        if not any(isinstance(r.layout, FactoredLayout) for r in self.ranges):
            return None
        return (sum(columns_size(r) for r in self.ranges),)


def flat_geometry(
    ranges: Sequence[Range],
    numel: int,
    group: ProcessGroup | None,
    device: torch.device,
    where: str = "parameter",
    *,
    quantised: bool = False,
) -> Geometry:
    """Return the local geometry of a 1-D tensor that contains ranges of flattened tensors, one after another.

    Args:
        ranges: the ranges that the local tensor contains. Elements outside all ranges are padding and are not stepped.
        numel: number of elements of the local tensor.
        group: process group whose ranks store the other elements; None if this rank has all of them.
        device: device on which the group communicates.
        where: description of the parameter for error messages.
        quantised: whether first moments are quantised, those of large tensors.

    Raises:
        ValueError: a layout does not fit its shape, or a range does not lie in its tensor.
    """
    local_ranges = [_LocalRange(r, where, quantised=quantised and quantises(r.shape)) for r in ranges]
    boxes: list[Box] = []
    counts, spreads, slots, positions = [], [], [], []
    blocks = values = columns_before = shared = 0
    boxes_of = []
    for local in local_ranges:
        boxes_of.append(list(local.boxes(values, blocks, columns_before)))
        boxes += [box for box, _, _ in boxes_of[-1]]
        columns_before += columns_size(local.source)
        counts.append(local.counts)
        spreads.append(local.spread + blocks)
        slots.append(local.cut_slots + blocks)
        positions.append(local.cut_positions + shared)
        blocks, values, shared = blocks + len(local.counts), values + len(local.spread), shared + local.shared
    signature = repr([(r.shape, *_identity(r.layout), r.bounds) for r in ranges])
    groups = () if group is None else (group,)
    single = (
        boxes[0] if len(boxes) == 1 and boxes[0].stop == numel and boxes[0].start == 0 and boxes[0].decays else None
    )
    factored = any(isinstance(r.layout, FactoredLayout) for r in ranges)
    quantised = any(box.row for box in boxes)
    if not factored and not shared and ((single is not None and not quantised) or not boxes):
        return Geometry((numel,), tuple(boxes), (values,), signature=signature, sharding_groups=groups)
    joined = [torch.cat(x) if x else torch.zeros(0, dtype=torch.int64) for x in (counts, spreads, slots, positions)]
    boxes = _with_free_boxes(boxes, joined[2], blocks)
    per_box = [torch.arange(*box.second) for box in boxes if box.second is not None and not box.free]
    not_free = torch.cat(per_box).unique() if per_box else torch.zeros(0, dtype=torch.int64)
    cut = Cut(
        groups=groups if shared else (),
        size=shared,
        slots=joined[2],
        positions=joined[3],
        blocks=Blocks(joined[0].double(), joined[1]),
        device=device,
        values=not_free if len(not_free) < values else None,
    )
    columns = flat_columns(ranges, boxes_of, boxes, group, device) if factored else None
    return Geometry((numel,), tuple(boxes), (values,), cut, None, signature, groups, columns)


def _identity(layout: TensorLayout) -> tuple[object, ...]:
    """Return what ranks must agree on."""
    if isinstance(layout, FactoredLayout):
        return (layout.axis, layout.leading, layout.fold, layout.segments, layout.repeat, layout.parts)
    return (layout.axis, layout.leading, layout.fold, layout.runs)


def _with_free_boxes(boxes: list[Box], cut_slots: Tensor, blocks: int) -> list[Box]:
    """Return boxes of the same elements, with free boxes split off.

    Args:
        boxes: the boxes of a local tensor.
        cut_slots: local blocks that are shared with other ranks, int64.
        blocks: number of local blocks.
    """
    boxes_per_block = torch.zeros(blocks, dtype=torch.int64)
    for box in boxes:
        assert box.slots is not None
        boxes_per_block[box.slots.unique()] += 1
    shared = boxes_per_block > 1
    shared[cut_slots] = True
    out: list[Box] = []
    for box in boxes:
        out += split(box, shared[box.slots])
    return out


def split(box: Box, shared: Tensor) -> list[Box]:
    """Split a box along its axis into up to three boxes, the middle one free.

    Args:
        box: the box to split.
        shared: for each aligned value of the box, whether its block has elements outside the box; bool.

    Returns:
        The boxes in order; a single free box if no block has elements outside it. The unchanged box if all its blocks
        have elements outside it, or the values of those that have none are not contiguous.
    """
    if box.factored or not box.decays or bool(shared.all()):  # a factored box is free already, or never
        return [box]
    if box.row and (box.shape is None or box.shape[3] != box.row):
        return [box]
    if not bool(shared.any()):
        return [replace(box, free=True)]
    first, last = int((~shared).nonzero()[0]), int((~shared).nonzero()[-1]) + 1
    contiguous = box.shape is None or box.shape[:2] == (1, 1)  # the elements of successive values are adjacent
    if not contiguous or bool(shared[first:last].any()):
        return [box]
    ends = ((0, first, False), (first, last, True), (last, len(shared), False))
    return [_along(box, start, stop, free) for start, stop, free in ends if start < stop]


def _along(box: Box, start: int, stop: int, free: bool) -> Box:
    """Return the aligned values [start, stop) of a box in which the elements of successive values are adjacent."""
    assert box.start is not None and box.second is not None and box.slots is not None
    assert isinstance(box.layout, Layout)  # boxes of factored tensors are not split
    inner = 1 if box.shape is None else box.shape[3]  # a box without a new shape is sliced along its own first axis
    edges = Edges(box.layout.runs)
    return replace(
        box,
        layout=Layout(box.layout.axis, local_runs(box.layout.runs, edges, ((start, stop),)), box.layout.leading),
        start=box.start + start * inner,
        stop=box.start + stop * inner,
        shape=None if box.shape is None else (1, 1, stop - start, inner),
        second=(box.second[0] + start, box.second[0] + stop),
        slots=box.slots[start:stop],
        free=free,
    )


def within(start: int, stop: int, low: int, high: int) -> tuple[int, int]:
    """Return the intersection of [start, stop) and [low, high), counted from ``start``; (0, 0) if it is empty."""
    first, last = max(start, low), min(stop, high)
    return (first - start, last - start) if first < last else (0, 0)


def box_shapes(start: int, stop: int, dims: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cover elements [start, stop) of a row-major tensor with few boxes.

    Args:
        start: first element of the flattened tensor.
        stop: end of the elements, exclusive.
        dims: shape of the tensor.

    Yields:
        (index of the first element, shape) of each box, in order.
    """
    if start >= stop:
        return
    if len(dims) == 1:
        yield (start,), (stop - start,)
        return
    inner = prod(dims[1:])
    first, last = -(-start // inner), stop // inner
    if start % inner and first > last:  # all elements lie inside one index of the first axis
        for index, shape in box_shapes(start % inner, stop - start + start % inner, dims[1:]):
            yield (first - 1, *index), (1, *shape)
        return
    if start % inner:
        for index, shape in box_shapes(start % inner, inner, dims[1:]):
            yield (first - 1, *index), (1, *shape)
    if last > first:
        yield (first, *(0 for _ in dims[1:])), (last - first, *dims[1:])
    for index, shape in box_shapes(0, stop - last * inner, dims[1:]):
        yield (last, *index), (1, *shape)


def _grouped_axes(shape: tuple[int, ...], layout: Layout) -> tuple[tuple[int, int, int, int], Runs]:
    """Return the dimensions (leads, between, axis, inner) of a tensor with grouped axes, and the runs along ``axis``.

    ``leads`` is the product of the layout's leading axes, ``between`` that of the axes from there to the layout's axis,
    and ``inner`` that of the axes after it. If ``between`` is 1, the leading axes are merged into ``axis``, and
    ``leads`` is 1.
    """
    view = viewed(shape, layout.fold) or (1,)
    lead, axis = len(layout.leading), layout.axis
    leads, between, inner = prod(view[:lead]), prod(view[lead:axis]), prod(view[axis + 1 :])
    if between == 1:
        runs = Runs(layout.runs.segments, layout.runs.repeat * max(leads, 1))
        return (1, between, leads * view[axis], inner), runs
    return (leads, between, view[axis], inner), layout.runs


def _second_moment_range(start: int, stop: int, dims: tuple[int, int, int, int]) -> tuple[int, int, tuple[int, int]]:
    """Return which second-moment values the elements [start, stop) of a flattened tensor need.

    Args:
        start: first element.
        stop: end of the elements, exclusive.
        dims: (leads, between, axis, inner) of the tensor, see ``_grouped_axes``.

    Returns:
        (first lead, number of leads, [start, stop) of the axis).
    """
    _, between, size, inner = dims
    if start == stop:
        return 0, 0, (0, 0)
    if between == 1:
        return 0, 1, (start // inner, -(-stop // inner))
    per_lead = between * size * inner
    return start // per_lead, -(-stop // per_lead) - start // per_lead, (0, size)


def _second_moment_size(source: Range) -> int:
    """Return the number of second-moment values that this rank stores for a range."""
    source.layout.require(source.shape, "a flattened tensor")
    dims, _ = _grouped_axes(source.shape, _rows(source.layout))
    _, leads, (first, last) = _second_moment_range(source.start, source.stop, dims)
    return leads * (last - first)


def _rows(layout: TensorLayout) -> Layout:
    """Return the layout of ``exp_avg_sq``: that of the rows, if the layout is factored."""
    return layout.rows if isinstance(layout, FactoredLayout) else layout


class _LocalRange:
    """The blocks, second moments and boxes of this rank's elements of one range. Local blocks are numbered from zero.

    The tensor is viewed as [leads, between, axis, inner]. If ``between`` is 1, the leading indices continue the axis: a
    block is then an interval of elements, and only the blocks at the two ends of a range can be cut. Otherwise, for
    example for columns, a range that ends inside a leading index cuts all blocks of that index.

    Attributes:
        counts: number of elements of each local block on all ranks together.
        spread: the local block of each value of the local second moment.
        shared: number of blocks that are cut anywhere, on all ranks together.
        cut_slots: the local blocks among these.
        cut_positions: the positions of ``cut_slots`` among all cut blocks.
    """

    def __init__(self, source: Range, where: str, *, quantised: bool = False) -> None:
        layout, shape = source.layout, source.shape
        layout.require(shape, where)
        if not 0 <= source.start <= source.stop <= prod(shape):
            raise ValueError(
                f"{where}: elements [{source.start}, {source.stop}) do not lie in a tensor of shape {shape}"
            )
        self.source = source
        self.row = prod(shape[-row_axes(shape) :]) if quantised else 0
        self.dims, self.runs = _grouped_axes(shape, _rows(layout))
        self.edges = Edges(self.runs)
        self._find_values()
        self._find_cut()

    def _find_values(self) -> None:
        """Find the values of the local second moment: a range of leads times a range of axis indices."""
        _, between, _, inner = self.dims
        self.first_lead, self.leads, self.axis_range = _second_moment_range(
            self.source.start, self.source.stop, self.dims
        )
        intervals = (self.axis_range,) if self.axis_range[1] > self.axis_range[0] else ()
        self.run_ids = run_ids(self.edges, intervals)
        lengths = local_runs(self.runs, self.edges, intervals).lengths()
        self.lengths = lengths
        per_run = torch.arange(len(self.run_ids)).repeat_interleave(lengths)
        lead = torch.arange(self.leads).unsqueeze(1)
        self.spread = (lead * len(self.run_ids) + per_run).flatten()
        self.counts = (self.edges.lengths(self.run_ids) * between * inner).repeat(self.leads)

    def _find_cut(self) -> None:
        """Find the blocks that a boundary between two ranks divides."""
        _, between, size, inner = self.dims
        per_lead = between * size * inner
        bounds = {x for start, stop in self.source.bounds if start < stop for x in (start, stop)}
        if between == 1:
            # A boundary inside a row cuts the row's block. A boundary between rows cuts a block that contains both.
            cut = {
                self.edges.run_of(x // inner)
                for x in bounds
                if 0 < x < prod(self.dims) and (x % inner or self.edges.inside(x // inner))
            }
            runs = torch.tensor(sorted(cut), dtype=torch.int64)
        else:
            leads = sorted({x // per_lead for x in bounds if x % per_lead})
            many = self.edges.many
            runs = torch.tensor([lead * many + run for lead in leads for run in range(many)], dtype=torch.int64)
        local = ((torch.arange(self.leads).unsqueeze(1) + self.first_lead) * self.edges.many + self.run_ids).flatten()
        self.shared = len(runs)
        self.cut_positions = torch.isin(runs, local).nonzero().squeeze(1)
        self.cut_slots = torch.searchsorted(local, runs[self.cut_positions])

    def boxes(self, values: int, blocks: int, columns: int) -> Iterable[tuple[Box, tuple[int, ...], tuple[int, ...]]]:
        """Yield the boxes of this range in the local tensor, each with the index of its first element and its shape.

        Args:
            values: number of second-moment values of earlier ranges.
            blocks: number of local blocks of earlier ranges.
            columns: number of column means of earlier ranges.
        """
        stop = self.source.offset
        values_per_lead = self.axis_range[1] - self.axis_range[0]
        for index, shape in box_shapes(self.source.start, self.source.stop, self.dims):
            first = (index[0] - self.first_lead) * values_per_lead + index[2] - self.axis_range[0]
            many = shape[0] * shape[2]
            start, stop = stop, stop + prod(shape)
            runs = local_runs(self.runs, self.edges, ((index[2], index[2] + shape[2]),))
            one_axis = shape[0] == shape[1] == shape[3] == 1
            box = Box(
                layout=Layout(0, runs) if one_axis else Layout(2, runs, shape[:1]),
                start=start,
                stop=stop,
                shape=None if one_axis else shape,
                second=(values + first, values + first + many),
                slots=self.spread[first : first + many] + blocks,
                decays=self.source.decays,
                factored=isinstance(self.source.layout, FactoredLayout),
                row=self.row,
            )
            yield whole_box(box, self.source, columns), index, shape
