"""Quantised first moments of flat tensors, which contain ranges of flattened tensors.

A rank stores the codes and scales of every block of which it has an element, as one process stores them, one range
after another. So whole rows have the codes, scales and random numbers of one process. A block that two ranks share has
a scale on each of them, computed from the elements that the rank has. In its codes, those of other ranks are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..state.first_moments import joined, spread
from ..step.moments import Format, quantises, row_axes, stored_shapes
from ..step.places import Place
from .flat import Range
from .geometry import Box

_CHUNK = 1 << 15  # elements stepped or converted at once, if a row is not longer
_ALIGNMENT = 8  # bytes, so that moments that are not quantised can be viewed in their dtype


def aligned(nbytes: int) -> int:
    """Return the bytes that ``nbytes`` take with what follows them up to the next range."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Piece(NamedTuple):
    """Elements of one range that lie in a row, or in several whole rows.

    Attributes:
        element: index of the first element in the flattened whole tensor.
        numel: number of elements.
        front: number of elements before them in their first block, which other ranks have.
        back: number of elements after them in their last block, which other ranks have.
        rows: number of rows.
        block: index of their first block in the whole tensor.
        blocks: number of blocks.
    """

    element: int
    numel: int
    front: int
    back: int
    rows: int
    block: int
    blocks: int

    def padded(self, values: Tensor, *, repeat: bool = False) -> Tensor:
        """Return [rows, elements of their blocks] from values of the elements, with zeros for those of other ranks.

        Args:
            values: one value per element, 1-D.
            repeat: use copies of the neighbouring value instead of zeros.
        """
        if self.front or self.back:
            ends = values[:1], values[-1:]
            front, back = (x.expand(k) if repeat else x.new_zeros(k) for x, k in zip(ends, self[2:4], strict=True))
            values = torch.cat([front, values, back])
        return values.view(self.rows, -1)

    def own(self, padded: Tensor) -> Tensor:
        """Return the values of the elements from those of their blocks."""
        return padded.flatten()[self.front : self.front + self.numel]


@dataclass(frozen=True)
class Stored:
    """Where the first moment of one range is stored.

    Attributes:
        source: the range.
        codes: [start, stop) of the bytes of its codes, or of its moment if that is not quantised.
        scales: [start, stop) of its scales; empty if it is not quantised.
        first_block: index in the whole tensor of the first block that is stored.
        first_byte: index in the one-process codes of the first byte that is stored.
        n: number of elements of a row; 0 if the range is not quantised.
    """

    source: Range
    codes: tuple[int, int]
    scales: tuple[int, int]
    first_block: int = 0
    first_byte: int = 0
    n: int = 0


class FlatMoment:
    """The first moment of a flat tensor.

    Attributes:
        ranges: the argument.
        requested: the argument ``format``.
        format: the format of ranges that are quantised; None if there are none.
        dtype: the argument.
        stored: where the moment of each range is stored, if some are quantised.
        shapes: shapes of codes and scales then.

    Args:
        ranges: the ranges that the flat tensor contains.
        numel: number of elements of the flat tensor.
        format: the format in which the moments of large tensors are quantised; None to quantise nothing. It is ignored
            if this rank has no element of a large one.
        dtype: dtype of moments that are not quantised next to ones that are, fp32 or float64.
    """

    def __init__(self, ranges: Sequence[Range], numel: int, format: Format | None, dtype: torch.dtype) -> None:
        self.ranges, self.dtype, self.numel = tuple(ranges), dtype, numel
        self.requested = format
        self._large = [r.shape for r in ranges if r.start < r.stop and quantises(r.shape)]
        self.format = format if self._large else None
        self._block_size = 1 if self.format is None else self.format.block
        self._per_byte = 1 if self.format is None else 8 // self.format.bits
        stored, byte, scale = [], 0, 0
        for source in ranges:
            size = source.stop - source.start
            if self.format is None or not size or not quantises(source.shape):
                stored.append(Stored(source, (byte, byte + size * dtype.itemsize), (scale, scale)))
            else:
                n = prod(source.shape[-row_axes(source.shape) :])
                blocks = self._block(source.start, n), self._block(source.stop - 1, n) + 1
                block = self.format.block
                last = min((source.stop - 1) % n // block * block + block, n)
                start = self._byte(source.start // n, source.start % n // block * block, n)
                stop = self._byte((source.stop - 1) // n, last + last % 2 * (self._per_byte - 1), n)
                ends = (byte, byte + stop - start), (scale, scale + blocks[1] - blocks[0])
                stored.append(Stored(source, *ends, blocks[0], start, n))
            byte, scale = aligned(stored[-1].codes[1]), stored[-1].scales[1]
        self.stored, self.shapes = tuple(stored), ((byte,), (scale,))

    def _block(self, element: int, n: int) -> int:
        """Return the block of an element in its whole tensor, whose rows have ``n`` elements."""
        return element // n * -(-n // self._block_size) + element % n // self._block_size

    def _byte(self, row: int, index: int, n: int) -> int:
        """Return the byte of an element's code in the codes of its whole tensor; ``index`` counts in its row."""
        return row * -(-n // self._per_byte) + index // self._per_byte

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, if the moment is quantised."""
        assert self.format is not None
        return self.shapes[0][0] + self.shapes[1][0] * self.format.scale_dtype.itemsize

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape that decides whether the moment is quantised: that of a large tensor, if one is."""
        return (self.numel,) if self.format is None else self._large[0]

    def zeros(self, device: torch.device) -> dict[str, Tensor]:
        """Return the quantised moment before the first step."""
        assert self.format is not None
        codes, scales = self.shapes
        return {
            "exp_avg": torch.zeros(codes, dtype=self.format.dtype, device=device),
            "exp_avg_scale": torch.zeros(scales, dtype=self.format.scale_dtype, device=device),
        }

    def pieces(self, stored: Stored, start: int, stop: int) -> Iterator[Piece]:
        """Yield the elements [start, stop) of a range's whole tensor, in order, few at a time.

        Args:
            stored: the range. If it is quantised, a boundary inside a block must be one of the range's own.
            start: first element.
            stop: end of the elements, exclusive.
        """
        n, size = stored.n, self._block_size
        if not n:
            for element in range(start, stop, _CHUNK):
                yield Piece(element, min(_CHUNK, stop - element), 0, 0, 1, 0, 0)
            return
        per_row, element = -(-n // size), start
        while element < stop:
            row, index = divmod(element, n)
            rows = min((stop - element) // n, max(1, _CHUNK // n)) if not index else 0
            if rows:
                yield Piece(element, rows * n, 0, 0, rows, row * per_row, rows * per_row)
                element += rows * n
                continue
            end = min(stop - row * n, n)  # in the row
            until = min(-(-end // size) * size, n)
            block = index // size
            blocks = -(-until // size) - block
            yield Piece(element, end - index, index % size, until - end, 1, row * per_row + block, blocks)
            element = row * n + end

    def local(self, stored: Stored, piece: Piece) -> slice:
        """Return the indices of a piece in the flat tensor."""
        first = stored.source.offset + piece.element - stored.source.start
        return slice(first, first + piece.numel)

    def moment(self, stored: Stored, exp_avg: Tensor) -> Tensor:
        """Return the moment of a range that is not quantised, 1-D, as a view."""
        if self.format is None:
            return exp_avg[stored.source.offset : stored.source.offset + stored.source.stop - stored.source.start]
        return exp_avg[slice(*stored.codes)].view(self.dtype)

    def views(self, stored: Stored, piece: Piece, exp_avg: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes [rows, bytes] and scales [rows, blocks] of a piece of a quantised range, as views."""
        row, index = divmod(piece.element - piece.front, stored.n)
        count = (piece.front + piece.numel + piece.back) // piece.rows
        width = -(-count // self._per_byte)
        first = stored.codes[0] + self._byte(row, index, stored.n) - stored.first_byte
        at = stored.scales[0] + piece.block - stored.first_block
        codes = exp_avg[first : first + piece.rows * width].view(piece.rows, width)
        return codes, scale[at : at + piece.blocks].view(piece.rows, -1)

    def box_state(self, box: Box, exp_avg: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the quantised moment of a free box, as views in the box's shape, whose last axes are a row."""
        stored = self.stored[self.range_of(box)]
        assert box.start is not None and box.stop is not None
        first, count = box.start - stored.source.offset, box.stop - box.start
        if not stored.n:
            moment = self.moment(stored, exp_avg)[first : first + count]
            return {"exp_avg": moment if box.shape is None else moment.unflatten(0, box.shape)}
        assert box.shape is not None
        assert self.format is not None
        per_row, rows = -(-stored.n // self._block_size), count // stored.n
        element = stored.source.start + first
        piece = Piece(element, count, 0, 0, rows, element // stored.n * per_row, rows * per_row)
        views = self.views(stored, piece, exp_avg, scale)
        axes = row_axes(stored.source.shape) if box.factored else 1  # others have grouped axes, the last one a row
        shapes = stored_shapes(box.shape[:-axes], box.shape[-axes:], self.format)
        shaped = (view.view(shape) for view, shape in zip(views, shapes, strict=True))
        return dict(zip(("exp_avg", "exp_avg_scale"), shaped, strict=True))

    def range_of(self, box: Box) -> int:
        """Return the index of the range that a box belongs to."""
        return range_of(self.ranges, box)

    def place(self, box: Box) -> Place:
        """Return where a box lies in its whole tensor."""
        source = self.ranges[self.range_of(box)]
        n = prod(source.shape[-row_axes(source.shape) :]) if source.shape else 1
        row, offset = divmod(source.start + (box.start or 0) - source.offset, n)
        return Place(source.shape, n, row, offset)

    def by_element(self, exp_avg: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the scale of every element. Scales of ranges that are not quantised are 0."""
        values = torch.zeros(self.numel, dtype=self.dtype, device=exp_avg.device)
        scales = torch.zeros_like(values)
        for stored in self.stored:
            source = stored.source
            for piece in self.pieces(stored, source.start, source.stop):
                at = self.local(stored, piece)
                if not stored.n:
                    first = piece.element - source.start
                    values[at] = self.moment(stored, exp_avg)[first : first + piece.numel]
                    continue
                count = (piece.front + piece.numel + piece.back) // piece.rows
                both = spread(*self.views(stored, piece, exp_avg, scale), count, self.dtype)
                values[at], scales[at] = (piece.own(x) for x in both)
        return values, scales

    def quantised(self, values: Tensor, scales: Tensor | None, *, step: int, seed: int) -> dict[str, Tensor]:
        """Return the moment as it is stored: the inverse of ``by_element``.

        Args:
            values: the value of each element of the flat tensor.
            scales: the scale of each element; None if the moment was not quantised.
            step: number of steps taken, for the rounding of blocks that were not quantised together.
            seed: seed of that rounding.
        """
        state = self.zeros(values.device)
        assert self.format is not None
        for k, stored in enumerate(self.stored):
            source = stored.source
            for piece in self.pieces(stored, source.start, source.stop):
                at = self.local(stored, piece)
                own = values[at].to(self.dtype)
                if not stored.n:
                    first = piece.element - source.start
                    self.moment(stored, state["exp_avg"])[first : first + piece.numel] = own
                    continue
                each = None if scales is None else piece.padded(scales[at].to(self.dtype), repeat=True)
                new = joined(piece.padded(own), each, self.format, step=step, seed=seed + k, first=piece.block)
                for view, x in zip(self.views(stored, piece, *state.values()), new, strict=True):
                    view.copy_(x)
        return state


def range_of(ranges: Sequence[Range], box: Box) -> int:
    """Return the index of the range that a box belongs to."""
    assert box.start is not None
    return next(k for k, r in enumerate(ranges) if 0 <= box.start - r.offset < r.stop - r.start)
