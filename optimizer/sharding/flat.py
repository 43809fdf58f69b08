"""From ranges of flattened tensors (FSDP1, ZeRO) to the local geometry of their layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..partition.layout import Layout, Runs
from ..partition.roles import viewed
from .geometry import Blocks, Box, Cut, Geometry
from .holdings import Edges, local_runs, run_ids

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Range:
    """Elements of one flattened (row-major) tensor, as ranks share them out.

    Attributes:
        shape: of the whole tensor.
        layout: of the whole tensor.
        bounds: [start, stop) of every rank of the group, in the group's order; empty where start == stop.
        rank: this rank's place in the group.
        offset: where the local elements begin in the local (1-D) tensor.
        decays: whether weight decay applies; False only where a flat parameter mixes what decays with what does not.
        name: of the tensor, empty where unknown.
    """

    shape: tuple[int, ...]
    layout: Layout
    bounds: tuple[tuple[int, int], ...]
    rank: int
    offset: int = 0
    decays: bool = True
    name: str = ""

    @property
    def start(self) -> int:
        """First element held here."""
        return self.bounds[self.rank][0]

    @property
    def stop(self) -> int:
        """One behind the last element held here."""
        return self.bounds[self.rank][1]


@dataclass(frozen=True)
class FlatLayout:
    """The layout of a 1-D tensor that holds ranges of flattened tensors; a sibling of ``Layout`` (``AnyLayout``).

    Attributes:
        ranges: what it holds.
        numel: its elements.
        group: name of the process group whose ranks hold the rest; empty where no other rank holds any.
        advice: for messages: what to do where the tensor no longer has ``numel`` elements.
    """

    ranges: tuple[Range, ...]
    numel: int
    group: str
    advice: str = field(default="", compare=False)

    @property
    def n_blocks(self) -> int:
        """Scalars of the tensors it holds ranges of, whole."""
        return sum(r.layout.n_blocks for r in self.ranges)

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape can have this layout."""
        return tuple(shape) == (self.numel,)

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Raise ValueError, with both numbers, when ``shape`` cannot have this layout."""
        if not self.fits(shape):
            advice = f"; {self.advice}" if self.advice else ""
            raise ValueError(
                f"{what} has shape {tuple(shape)}, but this rank was given {self.numel} elements of it{advice}"
            )

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Values of the local second moment."""
        return (sum(_values_of(r) for r in self.ranges),)


def flat_geometry(
    ranges: Sequence[Range], numel: int, group: ProcessGroup | None, device: torch.device, where: str = "parameter"
) -> Geometry:
    """The local geometry of a 1-D tensor that holds ranges of flattened tensors one behind the other.

    Args:
        ranges: what the local tensor holds; elements that no range covers are padding, and are not stepped.
        numel: of the local tensor.
        group: whose ranks hold the other elements; None where nobody else does.
        device: where the group communicates.
        where: the parameter in words, for messages.

    Raises:
        ValueError: a layout does not fit its shape, or a range its tensor.
    """
    held = [_Held(r, where) for r in ranges]
    parts: list[Box] = []
    counts, spreads, slots, positions = [], [], [], []
    blocks = values = shared = 0
    for one in held:
        parts += [part for part in one.boxes(values, blocks) if part is not None]
        counts.append(one.counts)
        spreads.append(one.spread + blocks)
        slots.append(one.cut_slots + blocks)
        positions.append(one.cut_positions + shared)
        blocks, values, shared = blocks + len(one.counts), values + len(one.spread), shared + one.shared
    signature = repr(
        [(r.shape, r.layout.axis, r.layout.leading, r.layout.fold, r.layout.runs, r.bounds) for r in ranges]
    )
    groups = () if group is None else (group,)
    single = (
        parts[0] if len(parts) == 1 and parts[0].stop == numel and parts[0].start == 0 and parts[0].decays else None
    )
    if not shared and (single is not None or not parts):
        return Geometry((numel,), tuple(parts), (values,), signature=signature, sharding_groups=groups)
    joined = [torch.cat(x) if x else torch.zeros(0, dtype=torch.int64) for x in (counts, spreads, slots, positions)]
    parts = _freed(parts, joined[2], blocks)
    rest = [torch.arange(*part.second) for part in parts if part.second is not None and not part.free]
    others = torch.cat(rest).unique() if rest else torch.zeros(0, dtype=torch.int64)
    cut = Cut(
        groups if shared else (), shared, joined[2], joined[3], Blocks(joined[0].double(), joined[1]), device,
        others if len(others) < values else None,
    )  # fmt: skip
    return Geometry((numel,), tuple(parts), (values,), cut, None, signature, groups)


def _freed(parts: list[Box], cut_slots: Tensor, blocks: int) -> list[Box]:
    """The same elements, with what has no block in common with other ranks or other parts in parts of its own."""
    held = torch.zeros(blocks, dtype=torch.int64)
    for part in parts:
        assert part.slots is not None
        held[part.slots.unique()] += 1
    bound = held > 1
    bound[cut_slots] = True
    out: list[Box] = []
    for part in parts:
        out += split(part, bound[part.slots])
    return out


def split(part: Box, bound: Tensor) -> list[Box]:
    """A part in up to three along its axis; ``bound``: which of its values' blocks lie elsewhere, too."""
    if not part.decays or bool(bound.all()):
        return [part]
    if not bool(bound.any()):
        return [replace(part, free=True)]
    first, last = int((~bound).nonzero()[0]), int((~bound).nonzero()[-1]) + 1
    simple = part.shape is None or part.shape[:2] == (1, 1)  # its values follow each other as its elements do
    if not simple or bool(bound[first:last].any()):
        return [part]
    ends = ((0, first, False), (first, last, True), (last, len(bound), False))
    return [_along(part, start, stop, free) for start, stop, free in ends if start < stop]


def _along(part: Box, start: int, stop: int, free: bool) -> Box:
    """Indices [start, stop) of a part whose values follow each other as its elements do."""
    assert part.start is not None and part.second is not None and part.slots is not None
    inner = 1 if part.shape is None else part.shape[3]  # rows of a part that keeps its shape are not unrolled
    edges = Edges(part.layout.runs)
    return replace(
        part,
        layout=Layout(part.layout.axis, local_runs(part.layout.runs, edges, ((start, stop),)), part.layout.leading),
        start=part.start + start * inner,
        stop=part.start + stop * inner,
        shape=None if part.shape is None else (1, 1, stop - start, inner),
        second=(part.second[0] + start, part.second[0] + stop),
        slots=part.slots[start:stop],
        free=free,
    )


def within(start: int, stop: int, low: int, high: int) -> tuple[int, int]:
    """The part of [start, stop) in [low, high), counted from ``start``."""
    first, last = max(start, low), min(stop, high)
    return (first - start, last - start) if first < last else (0, 0)


def box_shapes(start: int, stop: int, dims: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, stop) of a row-major tensor as few boxes, in order: (first index, shape) of each."""
    if start >= stop:
        return
    if len(dims) == 1:
        yield (start,), (stop - start,)
        return
    inner = prod(dims[1:])
    first, last = -(-start // inner), stop // inner
    if start % inner and first > last:  # inside one slice
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


def _seen(shape: tuple[int, ...], layout: Layout) -> tuple[tuple[int, int, int, int], Runs]:
    """A tensor as [leads, between, axis, inner], and the runs along that axis.

    Where nothing lies between, the leading indices continue the axis, so that there is one lead.
    """
    view = viewed(shape, layout.fold) or (1,)
    lead, axis = len(layout.leading), layout.axis
    leads, between, inner = prod(view[:lead]), prod(view[lead:axis]), prod(view[axis + 1 :])
    if between == 1:
        runs = Runs(layout.runs.segments, layout.runs.repeat * max(leads, 1))
        return (1, between, leads * view[axis], inner), runs
    return (leads, between, view[axis], inner), layout.runs


def _kept(start: int, stop: int, dims: tuple[int, int, int, int]) -> tuple[int, int, tuple[int, int]]:
    """The second moments of elements [start, stop): (first lead, how many leads, [start, stop) of the axis)."""
    _, between, size, inner = dims
    if start == stop:
        return 0, 0, (0, 0)
    if between == 1:
        return 0, 1, (start // inner, -(-stop // inner))
    per_lead = between * size * inner
    return start // per_lead, -(-stop // per_lead) - start // per_lead, (0, size)


def _values_of(held: Range) -> int:
    """How many second moments a rank keeps for a range."""
    held.layout.require(held.shape, "a flattened tensor")
    _, leads, (first, last) = _kept(held.start, held.stop, _seen(held.shape, held.layout)[0])
    return leads * (last - first)


class _Held:
    """One range in the terms of a geometry; local numbering starts at zero.

    The tensor is seen as [leads, between, axis, inner]. Where nothing lies between, the leading indices continue the
    axis: a block is then an interval of elements, and only the blocks at a range's two ends can be cut. Otherwise
    (columns) a range that ends inside a leading index cuts all of that index's blocks.

    Attributes:
        counts: global elements of each local block.
        spread: the local block of each value of the local second moment.
        shared: blocks that several ranks hold parts of, on all ranks together.
        cut_slots, cut_positions: local blocks among them, and their places.
    """

    def __init__(self, held: Range, where: str) -> None:
        layout, shape = held.layout, held.shape
        layout.require(shape, where)
        if not 0 <= held.start <= held.stop <= prod(shape):
            raise ValueError(f"{where}: elements [{held.start}, {held.stop}) do not lie in a tensor of shape {shape}")
        self.held = held
        self.dims, self.runs = _seen(shape, layout)
        self.edges = Edges(self.runs)
        self._find_values()
        self._find_cut()

    def _find_values(self) -> None:
        """Which values of the second moment are kept: [first lead, + leads) x axis indices [first, + many)."""
        _, between, _, inner = self.dims
        self.first_lead, self.leads, self.axis_range = _kept(self.held.start, self.held.stop, self.dims)
        here = (self.axis_range,) if self.axis_range[1] > self.axis_range[0] else ()
        self.run_ids = run_ids(self.edges, here)
        lengths = local_runs(self.runs, self.edges, here).lengths()
        self.lengths = lengths
        per_run = torch.arange(len(self.run_ids)).repeat_interleave(lengths)
        lead = torch.arange(self.leads).unsqueeze(1)
        self.spread = (lead * len(self.run_ids) + per_run).flatten()
        self.counts = (self.edges.lengths(self.run_ids) * between * inner).repeat(self.leads)

    def _find_cut(self) -> None:
        """Blocks that a boundary between two ranks goes through."""
        _, between, size, inner = self.dims
        per_lead = between * size * inner
        bounds = {x for start, stop in self.held.bounds if start < stop for x in (start, stop)}
        if between == 1:
            # A boundary inside a row cuts the row's block; one between rows a block that holds both.
            cut = sorted({
                self.edges.run_of(x // inner) for x in bounds
                if 0 < x < prod(self.dims) and (x % inner or self.edges.inside(x // inner))
            })  # fmt: skip
            runs = torch.tensor(cut, dtype=torch.int64)
        else:
            leads = sorted({x // per_lead for x in bounds if x % per_lead})
            many = self.edges.many
            runs = torch.tensor([lead * many + run for lead in leads for run in range(many)], dtype=torch.int64)
        mine = ((torch.arange(self.leads).unsqueeze(1) + self.first_lead) * self.edges.many + self.run_ids).flatten()
        self.shared = len(runs)
        self.cut_positions = torch.isin(runs, mine).nonzero().squeeze(1)
        self.cut_slots = torch.searchsorted(mine, runs[self.cut_positions])

    def boxes(self, values: int, blocks: int) -> Iterable[Box]:
        """Boxes of the local tensor; ``values`` and ``blocks`` are what earlier ranges take up."""
        at = self.held.offset
        whole = self.axis_range[1] - self.axis_range[0]
        for index, shape in box_shapes(self.held.start, self.held.stop, self.dims):
            first = (index[0] - self.first_lead) * whole + index[2] - self.axis_range[0]
            many = shape[0] * shape[2]
            start, at = at, at + prod(shape)
            if shape[3] == 1 and shape[1] == 1 and shape[0] == 1:
                box, layout = None, Layout(0, local_runs(self.runs, self.edges, ((index[2], index[2] + shape[2]),)))
            else:
                box = shape
                layout = Layout(2, local_runs(self.runs, self.edges, ((index[2], index[2] + shape[2]),)), shape[:1])
            yield Box(
                layout, start, at, box, (values + first, values + first + many),
                self.spread[first : first + many] + blocks, self.held.decays,
            )  # fmt: skip
