"""Tables on the device that assign work to the programs of each launch; they are built from layouts.

An *entry* describes the runs of equal length of one tensor, or a whole tensor if a kernel does not depend on runs. A
*program* is a row (entry, unit), where the unit is the part of the entry that the program processes. Tensors are
contiguous and viewed as [outer][between][axis][inner]; the runs lie along axis and repeat for each outer index.
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
from .factored_tables import Matrix, Means, Tile, matrix_work

BLOCK = 2048  # elements that a program processes at a time in one-dimensional work
TILE = 1024  # elements of a tile of the kernel ``rows``; with 4096, ptxas spills registers
LONGEST_ROW = 1 << 15  # elements; longer runs are divided among several programs
SMALLEST_CHUNK = 1 << 13  # smallest number of elements of a run per program
MOST_CHUNKS = 256  # largest number of programs per run and index of ``between``
SHORTEST_SPAN = 128  # elements; with shorter runs the kernels sum columns, so that a warp reads contiguous memory
ROWS, COLUMNS = 256, 64  # shape of a tile in which columns are summed
RUNS, PARTS = 16, 32  # shape of a tile in which partial sums are added; with 64 parts, ptxas spills registers


class Dense(NamedTuple):
    """The layout of a contiguous tensor in memory, [outer][between][axis][inner].

    Attributes:
        outer: product of the sizes of the layout's leading axes.
        between: product of the sizes of the axes between the leading axes and the axis of the runs.
        axis: size of the axis of the runs.
        inner: product of the sizes of the axes after it.
        repeat: how often the segments repeat along the axis.
        segments: (length, count) pairs: count neighbouring runs of length indices each.
    """

    outer: int
    between: int
    axis: int
    inner: int
    repeat: int
    segments: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layout: Layout, shape: Sequence[int]) -> Dense:
        """Describe a contiguous tensor of this shape under the layout."""
        view = viewed(tuple(shape), layout.fold) or (1,)
        lead, axis = len(layout.leading), layout.axis
        sizes = prod(view[:lead]), prod(view[lead:axis]), view[axis], prod(view[axis + 1 :])
        return cls(*sizes, layout.runs.repeat, layout.runs.segments)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.outer * self.between * self.axis * self.inner

    def numbers(self) -> list[int]:
        """Encode the layout as integers, for an operator's arguments; the first is the number of the others."""
        flat = [*self[:5], *(n for pair in self.segments for n in pair)]
        return [len(flat), *flat]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Iterator[Dense]:
        """Yield the layouts that are encoded one after another."""
        start = 0
        while start < len(numbers):
            flat = numbers[start + 1 : start + 1 + numbers[start]]
            outer, between, axis, inner, repeat = flat[:5]
            yield cls(outer, between, axis, inner, repeat, tuple(zip(flat[5::2], flat[6::2], strict=True)))
            start += 1 + numbers[start]


class Entry(NamedTuple):
    """A row of the table of entries; a field that a kernel does not read has its default.

    Attributes:
        tensor: index of the tensor.
        numel: number of elements of the tensor.
        axis: size of the axis of the runs.
        inner: number of elements per index of the axis in contiguous memory.
        between: number of indices between the outer axes and the axis of the runs.
        repeat: how often the segments repeat along the axis.
        segment_runs: number of runs of the segment.
        period: number of indices of all segments together.
        first: index, within a period, at which the segment begins.
        length: number of indices of a run.
        runs: number of runs of the entry, outer * repeat * segment_runs.
        chunks: number of chunks of a run per index of ``between`` (spans), or of chunks of rows (columns).
        chunk: number of elements of a chunk (spans), or of rows (columns).
        scratch: index in the scratch memory at which the partial sums begin.
        stride: distance in the scratch memory from the sums of one chunk to those of the next.
        sums_per_run: number of neighbouring sums per run (columns); 0 if there is one sum per run and chunk (spans).
    """

    tensor: int
    numel: int
    axis: int
    inner: int
    between: int
    repeat: int = 1
    segment_runs: int = 1
    period: int = 0
    first: int = 0
    length: int = 1
    runs: int = 1
    chunks: int = 1
    chunk: int = 0
    scratch: int = 0
    stride: int = 0
    sums_per_run: int = 0


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: name of the kernel.
        columns: columns of a tile of the kernel ``rows``; 0 for any other kernel.
        even: whether all rows, runs and tensors begin and end at multiples of 16 elements; False for the kernels of
            factored second moments, whose entries tell it.
        entries: int64 [E, fields], the table of entries.
        programs: int32 [P, 2], the (entry, unit) of each program.
    """

    kernel: str
    columns: int
    even: bool
    entries: Tensor
    programs: Tensor


@dataclass
class Tables:
    """The launches of one step.

    Attributes:
        launches: the launches in order.
        scratch: how many fp32 numbers of scratch memory the partial sums need.
    """

    launches: list[Launch]
    scratch: int


class _Builder:
    """Collects the entries of all tensors, by launch, and counts the scratch memory."""

    def __init__(self) -> None:
        self.work: defaultdict[tuple[str, int, bool], list[tuple[Entry | Tile | Means, int]]] = defaultdict(list)
        self.scratch = 0

    def add(self, kernel: str, entry: Entry, units: int, columns: int = 0) -> None:
        """Add an entry that ``units`` programs of the kernel process."""
        extents = {"each": entry.numel, "column_update": entry.numel, "column_sums": entry.axis * entry.inner}
        self.work[kernel, columns, extents.get(kernel, entry.inner) % 16 == 0].append((entry, units))

    def tensor(self, i: int, dense: Dense) -> None:
        """Choose the kernels for tensor number ``i`` and add its entries."""
        if dense.between * dense.inner == 1 and all(length == 1 for length, _ in dense.segments):
            self.add("each", Entry(i, dense.numel, dense.axis, 1, 1), _ceil(dense.numel, BLOCK))
            return
        shortest = min(length for length, _ in dense.segments) * dense.inner
        if dense.between > 1 and shortest < SHORTEST_SPAN:
            self.columns(i, dense)
            return
        for entry in _entries(i, dense):
            length = entry.length * entry.inner
            if dense.between == 1 and length <= LONGEST_ROW:
                columns = min(TILE, _power_of_two(length))
                self.add("rows", entry, _ceil(entry.runs, TILE // columns), columns)
            else:
                self.spans(entry)

    def matrix(self, i: int, matrix: Matrix) -> None:
        """Add the launches for tensor number ``i``, whose second moment is factored."""
        work, self.scratch = matrix_work(i, matrix, self.scratch)
        for kernel, entry, units in work:
            self.work[kernel, 0, False].append((entry, units))

    def spans(self, entry: Entry) -> None:
        """Add the launches for long runs, each of which is cut into chunks."""
        length = entry.length * entry.inner
        chunk = max(SMALLEST_CHUNK, _ceil(_ceil(length, MOST_CHUNKS), BLOCK) * BLOCK)
        entry = entry._replace(
            chunks=_ceil(length, chunk), chunk=chunk, scratch=self.scratch, stride=entry.runs, sums_per_run=0
        )
        programs = entry.runs * entry.between * entry.chunks
        self.scratch += programs
        self.add("span_sums", entry, programs)
        self.add("seconds", entry, _ceil(entry.runs, RUNS))
        self.add("span_update", entry, programs)

    def columns(self, i: int, dense: Dense) -> None:
        """Add the launches for a tensor whose columns are summed one by one, in chunks of rows."""
        width, chunks = dense.axis * dense.inner, _ceil(dense.between, ROWS)
        shared = {"chunks": chunks, "chunk": ROWS, "scratch": self.scratch, "stride": dense.outer * width}
        whole = Entry(i, dense.numel, dense.axis, dense.inner, dense.between, **shared)
        self.scratch += chunks * dense.outer * width
        self.add("column_sums", whole, dense.outer * _ceil(width, COLUMNS) * chunks)
        for entry in _entries(i, dense):
            entry = entry._replace(**shared, sums_per_run=entry.length * entry.inner)
            self.add("seconds", entry, _ceil(entry.runs, RUNS))
        self.add("column_update", whole, _ceil(dense.numel, BLOCK))


_ORDER = (
    "each",
    "rows",
    "span_sums",
    "column_sums",
    "factored_sums",
    "seconds",
    "factored_moments",
    "span_update",
    "column_update",
    "factored_update",
)


def tables(layouts: Sequence[Dense | Matrix], device: torch.device) -> Tables:
    """Build the launches of one step of tensors with these layouts; a tensor's number is its index in ``layouts``."""
    builder = _Builder()
    for i, dense in enumerate(layouts):
        if isinstance(dense, Matrix) and dense.numel:
            builder.matrix(i, dense)
        elif isinstance(dense, Dense) and dense.numel:
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


def _entries(i: int, dense: Dense) -> Iterator[Entry]:
    """Yield one entry per segment of tensor number ``i``."""
    period, first = dense.axis // dense.repeat, 0
    for length, count in dense.segments:
        yield Entry(
            i,
            dense.numel,
            dense.axis,
            dense.inner,
            dense.between,
            dense.repeat,
            count,
            period,
            first,
            length,
            dense.outer * dense.repeat * count,
        )
        first += length * count


def _ceil(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
