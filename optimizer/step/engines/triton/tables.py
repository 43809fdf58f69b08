"""Which program of a launch does what: layouts, turned into tables that live on the device.

An *entry* is a family of alike runs of one tensor (or a whole tensor, where runs do not matter); a *program* is a row
(entry, unit). Tensors are dense and seen as [outer][between][axis][inner], with runs along axis for each outer index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ....partition.layout import Layout
from ....partition.roles import viewed

BLOCK = 2048  # elements a program handles at a time in flat work
TILE = 4096  # elements of a tile of rows
LONGEST_ROW = 1 << 15  # elements: beyond, a run is cut over programs
PIECE = 1 << 13  # elements of a run per program, at least
PIECES = 256  # programs per run and ``between`` index, at most
SHORTEST_SPAN = 128  # elements: below, a warp reads columns side by side instead
ROWS, COLUMNS = 256, 64  # of a tile in which columns are summed
RUNS, PARTS = 16, 64  # of a tile in which partial sums are added up


class Dense(NamedTuple):
    """A layout as memory: runs are ``segments`` of (length, count), ``repeat`` times along ``axis``."""

    outer: int
    between: int
    axis: int
    inner: int
    repeat: int
    segments: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layout: Layout, shape: Sequence[int]) -> Dense:
        """The layout of a contiguous tensor of this shape."""
        view = viewed(tuple(shape), layout.fold) or (1,)
        lead, axis = len(layout.leading), layout.axis
        sizes = prod(view[:lead]), prod(view[lead:axis]), view[axis], prod(view[axis + 1 :])
        return cls(*sizes, layout.runs.repeat, layout.runs.segments)

    @property
    def numel(self) -> int:
        """Elements."""
        return self.outer * self.between * self.axis * self.inner

    def numbers(self) -> list[int]:
        """As integers, for an operator's arguments: their number first."""
        flat = [*self[:5], *(n for pair in self.segments for n in pair)]
        return [len(flat), *flat]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Iterator[Dense]:
        """The inverse, of several one after the other."""
        at = 0
        while at < len(numbers):
            flat = numbers[at + 1 : at + 1 + numbers[at]]
            outer, between, axis, inner, repeat = flat[:5]
            yield cls(outer, between, axis, inner, repeat, tuple(zip(flat[5::2], flat[6::2], strict=True)))
            at += 1 + numbers[at]


class Entry(NamedTuple):
    """A row of the table of entries; what a kernel has no use for keeps its default."""

    tensor: int
    numel: int
    axis: int
    inner: int
    between: int
    repeat: int = 1
    alike: int = 1  # runs of the segment
    period: int = 0  # indices of all segments
    first: int = 0  # index at which the segment begins
    length: int = 1  # indices of a run
    runs: int = 1  # of the entry: outer * repeat * count
    pieces: int = 1  # per ``between`` index of a run (spans), or chunks of rows (columns)
    piece: int = 0  # elements, or rows
    scratch: int = 0  # where the partial sums begin
    stride: int = 0  # from one piece's sums to the next piece's
    summed: int = 0  # neighbouring sums of a run: 0 where sums are numbered by run, one each


class Launch(NamedTuple):
    """One kernel's work: its name, its tile where that varies, its tables."""

    kernel: str
    columns: int  # of a tile of rows, else 0
    even: bool  # everything begins and ends at multiples of 16 elements
    entries: Tensor  # int64 [E, FIELDS]
    programs: Tensor  # int32 [P, 2]: entry, unit


@dataclass
class Tables:
    """Everything a step of these layouts launches, in order, and the partial sums it needs in between."""

    launches: list[Launch]
    scratch: int  # fp32 numbers


class _Builder:
    def __init__(self) -> None:
        self.work: defaultdict[tuple[str, int, bool], list[tuple[Entry, int]]] = defaultdict(list)
        self.scratch = 0

    def add(self, kernel: str, entry: Entry, units: int, columns: int = 0) -> None:
        divisible = {"each": entry.numel, "column_update": entry.numel, "column_sums": entry.axis * entry.inner}
        self.work[kernel, columns, divisible.get(kernel, entry.inner) % 16 == 0].append((entry, units))

    def tensor(self, i: int, dense: Dense) -> None:
        """Choose how the tensor is worked through."""
        if dense.between * dense.inner == 1 and all(length == 1 for length, _ in dense.segments):
            self.add("each", Entry(i, dense.numel, dense.axis, 1, 1), _ceil(dense.numel, BLOCK))
            return
        shortest = min(length for length, _ in dense.segments) * dense.inner
        if dense.between > 1 and shortest < SHORTEST_SPAN:
            self.columns(i, dense)
            return
        for entry in _families(i, dense):
            length = entry.length * entry.inner
            if dense.between == 1 and length <= LONGEST_ROW:
                columns = min(TILE, _power(length))
                self.add("rows", entry, _ceil(entry.runs, TILE // columns), columns)
            else:
                self.spans(entry)

    def spans(self, entry: Entry) -> None:
        length = entry.length * entry.inner
        piece = max(PIECE, _ceil(_ceil(length, PIECES), BLOCK) * BLOCK)
        entry = entry._replace(
            pieces=_ceil(length, piece), piece=piece, scratch=self.scratch, stride=entry.runs, summed=0
        )
        programs = entry.runs * entry.between * entry.pieces
        self.scratch += programs
        self.add("span_sums", entry, programs)
        self.add("seconds", entry, _ceil(entry.runs, RUNS))
        self.add("span_update", entry, programs)

    def columns(self, i: int, dense: Dense) -> None:
        width, pieces = dense.axis * dense.inner, _ceil(dense.between, ROWS)
        shared = {"pieces": pieces, "piece": ROWS, "scratch": self.scratch, "stride": dense.outer * width}
        whole = Entry(i, dense.numel, dense.axis, dense.inner, dense.between, **shared)
        self.scratch += pieces * dense.outer * width
        self.add("column_sums", whole, dense.outer * _ceil(width, COLUMNS) * pieces)
        for entry in _families(i, dense):
            entry = entry._replace(**shared, summed=entry.length * entry.inner)
            self.add("seconds", entry, _ceil(entry.runs, RUNS))
        self.add("column_update", whole, _ceil(dense.numel, BLOCK))


_ORDER = ("each", "rows", "span_sums", "column_sums", "seconds", "span_update", "column_update")


def tables(layouts: Sequence[Dense], device: torch.device) -> Tables:
    """The launches of one step of tensors with these layouts; a tensor's number is its position."""
    builder = _Builder()
    for i, dense in enumerate(layouts):
        if dense.numel:
            builder.tensor(i, dense)
    launches = []
    for (kernel, columns, even), work in sorted(builder.work.items(), key=lambda item: _ORDER.index(item[0][0])):
        units = torch.tensor([n for _, n in work])
        firsts = torch.repeat_interleave(units.cumsum(0) - units, units)
        owners = torch.arange(len(work)).repeat_interleave(units)
        programs = torch.stack([owners, torch.arange(len(owners)) - firsts], 1)
        entries = torch.tensor([entry for entry, _ in work], dtype=torch.int64)
        launches.append(Launch(kernel, columns, even, entries.to(device), programs.to(torch.int32).to(device)))
    return Tables(launches, builder.scratch)


def _families(i: int, dense: Dense) -> Iterator[Entry]:
    """One entry per segment."""
    period, first = dense.axis // dense.repeat, 0
    for length, count in dense.segments:
        yield Entry(
            i, dense.numel, dense.axis, dense.inner, dense.between, dense.repeat, count, period, first, length,
            dense.outer * dense.repeat * count,
        )  # fmt: skip
        first += length * count


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (n - 1).bit_length()
