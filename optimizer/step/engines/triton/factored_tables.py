"""Work of the three launches for tensors with a factored second moment; see ``tables`` for entries, programs and units.

A tensor is viewed as [outer][between][axis][inner]: its rows lie along axis, its columns along between and inner, and
each outer index has means of its own. A *piece* consists of neighbouring rows of one part. Tiles are two-dimensional,
and their *fast* direction is contiguous in memory. It is inner, with a tile for every index of between, unless inner is
1: then it is axis, and the *slow* direction is between, as in the Conv1D of GPT-2.

    factored_sums     stores the sums of squares of a tile over each of its directions
    factored_moments  adds those sums, updates the means of rows and columns, and stores sums of the means of columns
    factored_update   updates the first moments and parameters of a tile
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from ....partition.factored import FactoredLayout
from ....partition.roles import viewed

# Indices of a program along the slow direction, of one step of its loop, and of the program along the fast direction.
# Wide tiles are for contiguous ranges that begin and end at multiples of 16 elements. Lanes of a warp that read single
# elements need no wider tile than a warp.
WIDE, NARROW = (64, 8, 256), (256, 32, 32)
SHORTEST_WIDE = 128  # elements of the fast direction; with fewer, most of a wide tile would be empty
MEANS, SUMS = 64, 32  # shape of a tile in which partial sums are added: means, and sums of each
PARTIAL_MEANS = 128  # partial sums of column means that are added at a time
ROW_MEANS, COLUMN_MEANS = 3, 5  # columns of the table of addresses


class Matrix(NamedTuple):
    """A factored layout of a contiguous tensor in memory, [outer][between][axis][inner].

    Attributes:
        outer: product of the sizes of the layout's leading axes.
        between: product of the sizes of the axes between the leading axes and the axis of the rows.
        axis: size of the axis of the rows.
        inner: product of the sizes of the axes after it.
        repeat: how often the segments repeat along the axis.
        parts: number of parts.
        segments: (part, length) pairs along the axis.
    """

    outer: int
    between: int
    axis: int
    inner: int
    repeat: int
    parts: int
    segments: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layout: FactoredLayout, shape: Sequence[int]) -> Matrix:
        """Describe a contiguous tensor of this shape under the layout."""
        view = viewed(tuple(shape), layout.fold)
        lead, axis = len(layout.leading), layout.axis
        sizes = prod(view[:lead]), prod(view[lead:axis]), view[axis], prod(view[axis + 1 :])
        return cls(*sizes, layout.repeat, layout.parts, layout.segments)

    def numbers(self) -> list[int]:
        """Encode the layout as integers, for an operator's arguments; the first is the number of the others."""
        flat = [*self[:6], *(n for pair in self.segments for n in pair)]
        return [len(flat), *flat]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Iterator[Matrix]:
        """Yield the layouts that are encoded one after another."""
        start = 0
        while start < len(numbers):
            flat = numbers[start + 1 : start + 1 + numbers[start]]
            outer, between, axis, inner, repeat, parts = flat[:6]
            pairs = tuple(zip(flat[6::2], flat[7::2], strict=True))
            yield cls(outer, between, axis, inner, repeat, parts, pairs)
            start += 1 + numbers[start]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.outer * self.between * self.axis * self.inner

    @property
    def rows_are_fast(self) -> bool:
        """Whether the fast direction is that of the rows."""
        return self.inner == 1 and self.between > 1

    @property
    def wide(self) -> bool:
        """Whether every piece consists of contiguous ranges that suit wide tiles."""
        if not self.rows_are_fast:
            return self.inner % 16 == 0 and self.inner >= SHORTEST_WIDE
        lengths = [length for _, length in self.segments]
        return all(n % 16 == 0 for n in lengths) and min(lengths) >= SHORTEST_WIDE


class Tile(NamedTuple):
    """A row of the table of entries of ``factored_sums`` and ``factored_update``: the pieces of one segment.

    Attributes:
        tensor: index of the tensor.
        wide: 1 for wide tiles, 0 for narrow ones.
        rows_are_fast: 1 if the fast direction is that of the rows, else 0.
        axis: size of the axis of the rows.
        inner: product of the sizes of the axes after it.
        between: product of the sizes of the axes before it, without the leading ones.
        repeat: number of pieces per outer index.
        period: distance from the first row of a piece to that of the next.
        first: first row of the first piece.
        length: number of rows of a piece.
        parts: number of parts of the tensor.
        part: part of the pieces.
        row_sums: index in the scratch memory at which the sums of rows begin.
        row_stride: distance there from the sums of one tile to those of the next.
        column_sums: index in the scratch memory at which the sums of the part's columns begin.
        column_stride: distance there from the sums of one tile to those of the next.
        first_tile: number of the first piece's first tile among the part's tiles along the axis.
        tiles: how many tiles the part has along the axis from one piece to the next of the same segment.
        means: index in the scratch memory at which the sums of the part's column means begin.
        partial_means: number of sums of column means per outer index.
        columns: number of columns.
    """

    tensor: int
    wide: int
    rows_are_fast: int
    axis: int
    inner: int
    between: int
    repeat: int
    period: int
    first: int
    length: int
    parts: int
    part: int
    row_sums: int
    row_stride: int
    column_sums: int
    column_stride: int
    first_tile: int
    tiles: int
    means: int
    partial_means: int
    columns: int


class Means(NamedTuple):
    """A row of the table of entries of ``factored_moments``: the row means of a tensor, or the column means of a part.

    Attributes:
        tensor: index of the tensor.
        which: column of ``addresses`` with the address of the means, ROW_MEANS or COLUMN_MEANS.
        length: number of means per outer index.
        outer: number of outer indices.
        sums: index in the scratch memory at which the sums begin.
        stride: distance there from the sums of one tile to those of the next.
        tiles: number of sums per mean.
        size: number of elements that a mean is over.
        inner: number of neighbouring means in memory.
        step: distance in memory from one group of neighbours to the next.
        first: index in memory of the first mean.
        means: index in the scratch memory at which the sums of the means begin; -1 to store none.
    """

    tensor: int
    which: int
    length: int
    outer: int
    sums: int
    stride: int
    tiles: int
    size: int
    inner: int
    step: int
    first: int
    means: int


def matrix_work(i: int, matrix: Matrix, scratch: int) -> tuple[list[tuple[str, Tile | Means, int]], int]:
    """List the entries of a tensor.

    Args:
        i: index of the tensor.
        matrix: its layout.
        scratch: index in the scratch memory from which on it is free.

    Returns:
        (name of the kernel, entry, number of programs) of each entry, and the index from which on it is free then.
    """
    outer, between, axis, inner, repeat, parts, segments = matrix
    slow, _, fast = WIDE if matrix.wide else NARROW
    along = fast if matrix.rows_are_fast else slow  # rows per tile
    across = _ceil(between, slow) if matrix.rows_are_fast else between * _ceil(inner, fast)  # tiles per row
    columns = between * inner
    whole = Means(i, ROW_MEANS, outer * axis, 1, scratch, outer * axis, across, columns, outer * axis, 0, 0, -1)
    scratch += across * outer * axis
    work: list[tuple[str, Tile | Means, int]] = [("factored_moments", whole, _ceil(whole.length, MEANS))]
    per_period: Counter[int] = Counter()  # tiles per part
    sizes: Counter[int] = Counter()  # rows per part
    for part, length in segments:
        per_period[part] += _ceil(length, along)
        sizes[part] += repeat * length
    blocks = _ceil(columns, MEANS)
    of_part = []
    for part in range(parts):
        tiles = repeat * per_period[part]
        sums, means = scratch, scratch + tiles * outer * columns
        scratch = means + outer * blocks
        size = max(1, sizes[part])  # a part without rows has means of 0
        place = (inner, parts * inner, part * inner)
        of_part.append(Means(i, COLUMN_MEANS, columns, outer, sums, outer * columns, tiles, size, *place, means))
        work.append(("factored_moments", of_part[-1], outer * blocks))
    seen: Counter[int] = Counter()
    first = 0
    for part, length in segments:
        c = of_part[part]
        entry = Tile(
            tensor=i,
            wide=int(matrix.wide),
            rows_are_fast=int(matrix.rows_are_fast),
            axis=axis,
            inner=inner,
            between=between,
            repeat=repeat,
            period=axis // repeat,
            first=first,
            length=length,
            parts=parts,
            part=part,
            row_sums=whole.sums,
            row_stride=whole.stride,
            column_sums=c.sums,
            column_stride=c.stride,
            first_tile=seen[part],
            tiles=per_period[part],
            means=c.means,
            partial_means=blocks,
            columns=columns,
        )
        units = outer * repeat * across * _ceil(length, along)
        work += [("factored_sums", entry, units), ("factored_update", entry, units)]
        seen[part] += _ceil(length, along)
        first += length
    return work, scratch


def _ceil(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)
