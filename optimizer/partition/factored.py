"""Factored layouts: tensors whose second moment is a product of row means and column means.

For a matrix, v_ij = r_i c_j / mean(r), where r and c are moving averages of the means of g**2 over rows and columns
(Shazeer and Stern, "Adafactor", arXiv 1804.04235, Algorithm 2). A fused tensor has column means for each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch

from .layout import Layout, Runs
from .roles import viewed

_MaybeTensor = TypeVar("_MaybeTensor", torch.Tensor, torch.Tensor | None)


@dataclass(frozen=True, init=False)
class FactoredLayout:
    """The layout of a tensor with a factored second moment.

    A *row* is one index of ``axis`` and of the leading axes. A *column* is one index of every other axis. The means of
    rows are stored in the shape of ``rows``, those of columns in ``columns_shape``; both broadcast against the tensor,
    except that a tensor of several parts has one index per part where the tensor has ``axis``.

    Attributes:
        rows: the layout of the row means: one block per row.
        segments: consecutive (part, length) pairs along ``axis``, in order.
        repeat: how often the sequence of segments repeats along ``axis``.
        parts: the number of parts, each of which has its own column means.
        columns: the number of columns.

    Raises:
        ValueError: the segments do not add up to the size of ``axis``, or a segment names a part that does not exist.

    Example:
        >>> FactoredLayout((6, 4), axis=0).n_blocks                              # 6 row means and 4 column means
        10
        >>> FactoredLayout((6, 4), axis=0, segments=[(0, 2), (1, 4)]).n_blocks   # 4 column means for each part
        14
    """

    rows: Layout
    segments: tuple[tuple[int, int], ...]
    repeat: int
    parts: int
    columns: int

    def __init__(
        self,
        shape: Iterable[int],
        axis: int,
        segments: Iterable[tuple[int, int]] | None = None,
        *,
        repeat: int = 1,
        parts: int | None = None,
        leading: int = 0,
        fold: int = 1,
        note: str = "",
    ) -> None:
        """Describe a tensor.

        Args:
            shape: the tensor's shape.
            axis: the axis of the rows.
            segments: consecutive (part, length) pairs along ``axis``; None for a single part.
            repeat: how often the sequence of segments repeats.
            parts: the number of parts; None to count those in ``segments``.
            leading: the number of first axes, such as experts, whose indices have means of their own.
            fold: the number of equal pieces that axis 0 is split into first; ``axis`` and ``leading`` count the axes
                after the split.
            note: how the layout differs from what the rules ask for; ignored when layouts are compared.
        """
        view = viewed(tuple(shape), fold)
        pairs = tuple((int(p), int(n)) for p, n in (segments if segments is not None else [(0, view[axis])]) if n)
        count = parts if parts is not None else 1 + max((part for part, _ in pairs), default=0)
        if repeat * sum(length for _, length in pairs) != view[axis] or any(not 0 <= p < count for p, _ in pairs):
            raise ValueError(
                f"segments={pairs} repeated {repeat} times must have parts in [0, {count}) and cover the {view[axis]} "
                f"indices of axis {axis} of shape {view}"
            )
        rows = Layout(axis, Runs(((1, view[axis]),)), view[:leading], note, fold)
        self._set(rows, pairs, repeat, count, prod(view[leading:]) // max(1, view[axis]))

    def described(self, note: str) -> FactoredLayout:
        """Return the same layout with another note."""
        return self._of(self.rows.described(note), self.segments, self.repeat, self.parts, self.columns)

    @classmethod
    def _of(
        cls, rows: Layout, segments: tuple[tuple[int, int], ...], repeat: int, parts: int, columns: int
    ) -> FactoredLayout:
        """Return a layout from its attributes."""
        out: FactoredLayout = object.__new__(cls)
        out._set(rows, segments, repeat, parts, columns)
        return out

    def _set(self, rows: Layout, segments: tuple[tuple[int, int], ...], repeat: int, parts: int, columns: int) -> None:
        """Set the attributes of a new layout."""
        values = {"rows": rows, "segments": segments, "repeat": repeat, "parts": parts, "columns": columns}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def axis(self) -> int:
        """The axis of the rows, counted after axis 0 is split into ``fold``."""
        return self.rows.axis

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the first axes, whose indices have means of their own."""
        return self.rows.leading

    @property
    def fold(self) -> int:
        """The number of equal pieces that axis 0 is split into first."""
        return self.rows.fold

    @property
    def note(self) -> str:
        """How the layout differs from what the rules ask for."""
        return self.rows.note

    @property
    def n_blocks(self) -> int:
        """The number of second-moment scalars: one per row, and one per part and column."""
        return self.rows.n_blocks + prod(self.leading) * self.parts * self.columns

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape can have this layout."""
        shape = tuple(shape)
        if not self.rows.fits(shape):
            return False
        return prod(viewed(shape, self.fold)[len(self.leading) :]) == self.rows.runs.total * self.columns

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Check that a tensor of this shape can have this layout.

        Args:
            shape: the tensor's shape.
            what: the tensor's name in the message.

        Raises:
            ValueError: it cannot; the message has the shape and the sizes that the layout needs.
        """
        shape = tuple(shape)
        if not self.fits(shape):
            raise ValueError(
                f"{what} has shape {shape}, but its factored layout has {self.rows.runs.total} rows along axis "
                f"{self.axis} and {self.columns} columns after leading axes {self.leading} (axis 0 in {self.fold} "
                "piece(s)); build the optimizer from the tensor as it is used in step()"
            )

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the row means, which broadcasts against the tensor as that of a ``Layout`` does."""
        return self.rows.aligned_shape(shape)

    def columns_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the column means: the tensor's, with one index per part instead of ``axis``.

        With ``fold`` > 1, this holds after axis 0 of both is split into (fold, rest).
        """
        view = viewed(tuple(shape), self.fold)
        columns = (*view[: self.axis], self.parts, *view[self.axis + 1 :])
        return columns if self.fold == 1 else (columns[0] * columns[1], *columns[2:])

    def unfolded(self) -> FactoredLayout:
        """Return the same layout for the view of the tensor in which axis 0 is already split."""
        if self.fold == 1:
            return self
        return self._of(self.rows.unfolded(), self.segments, self.repeat, self.parts, self.columns)

    def merged(self) -> FactoredLayout:
        """Return the same layout without a fold, if the rows lie along axis 0; each piece then has parts of its own."""
        if self.fold == 1 or self.axis != 1:
            return self
        period = self.segments * self.repeat
        segments = [(piece * self.parts + part, length) for piece in range(self.fold) for part, length in period]
        rows = Layout(0, Runs(((1, self.fold * self.rows.runs.total),)), note=self.note)
        return FactoredLayout._of(rows, tuple(segments), 1, self.fold * self.parts, self.columns)

    def unfold(self, *tensors: _MaybeTensor) -> list[_MaybeTensor]:
        """Return views of tensors in which axis 0 is split into (fold, rest); see ``Layout.unfold``.

        Args:
            *tensors: tensors of the parameter's shape, of row means or of column means; None is returned as None.
        """
        return self.rows.unfold(*tensors)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield (part, first index, number of indices) of consecutive indices of ``axis`` that have the same part."""
        start = 0
        for _ in range(self.repeat):
            for part, length in self.segments:
                yield part, start, length
                start += length

    def part_of_row(self) -> torch.Tensor:
        """Return the part of every index of ``axis``, int64."""
        pairs = torch.tensor(self.segments, dtype=torch.int64).reshape(-1, 2)
        return pairs[:, 0].repeat_interleave(pairs[:, 1]).repeat(self.repeat)

    def part_sizes(self) -> torch.Tensor:
        """Return the number of indices of ``axis`` in each part, int64 [parts]."""
        return torch.bincount(self.part_of_row(), minlength=self.parts)

    def refines(self, other: Layout, shape: Iterable[int]) -> bool:
        """Whether elements that have the same second moment here always have the same one under another layout.

        Every element of a factored tensor has a second moment of its own, so the answer is True.
        """
        return True

    def block_ids(self, shape: Iterable[int]) -> torch.Tensor:
        """Return a number of its own for every element, in row-major order, int64 of shape ``shape``.

        Elements of one block have the same second moment. No two elements of a factored tensor have it in common, so
        this tells nothing about how many scalars are stored; ``n_blocks`` does.

        Args:
            shape: the tensor's shape.

        Raises:
            ValueError: a tensor of this shape cannot have this layout.
        """
        shape = tuple(shape)
        self.require(shape)
        return torch.arange(prod(shape)).reshape(shape)


TensorLayout = Layout | FactoredLayout
"""The layout of an ordinary tensor; flattened tensors have a ``sharding.flat.FlatLayout``."""
