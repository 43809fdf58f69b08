"""The one representation: contiguous runs along one axis of a tensor.

The elements of a run, over all other axes but the leading ones, share one second-moment scalar. Every partition
that matters is such a list of runs, fused projections and experts included, and so is any shard of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Protocol, TypeVar

import torch

from .roles import viewed

_Held = TypeVar("_Held", torch.Tensor, torch.Tensor | None)


class AnyLayout(Protocol):
    """How a tensor falls into blocks, whichever form describes it: ``Layout``, or ``sharding.flat.FlatLayout``."""

    @property
    def n_blocks(self) -> int:
        """The number of second-moment scalars."""

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape can have this layout."""

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Raise ValueError, with both numbers, when ``shape`` cannot have this layout."""

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Shape of the second moment."""


def _merged(segments: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbouring segments of equal run length and drop empty ones."""
    out: list[tuple[int, int]] = []
    for length, count in segments:
        if count == 0:
            continue
        if out and out[-1][0] == length:
            out[-1] = (length, out[-1][1] + count)
        else:
            out.append((length, count))
    return out


def _shortest_period(items: list[tuple[int, int]]) -> int:
    """The shortest p that divides len(items) with items = items[:p] repeated (Knuth-Morris-Pratt borders)."""
    border = [0] * len(items)
    for i in range(1, len(items)):
        k = border[i - 1]
        while k and items[i] != items[k]:
            k = border[k - 1]
        border[i] = k + (items[i] == items[k])
    period = len(items) - border[-1] if items else 1
    return period if items and len(items) % period == 0 else max(len(items), 1)


@dataclass(frozen=True)
class Runs:
    """Run lengths, compressed: ``segments`` of (length, count), the whole sequence ``repeat`` times.

    Two ``Runs`` that describe the same lengths are equal, however they were written.

    Attributes:
        segments: (length, count) pairs, in order.
        repeat: how often the sequence of segments repeats.
    """

    segments: tuple[tuple[int, int], ...]
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.repeat < 1 or any(length < 1 or count < 0 for length, count in self.segments):
            raise ValueError(
                f"runs must have lengths >= 1 and counts >= 0, repeated at least once; got segments={self.segments}, "
                f"repeat={self.repeat}"
            )
        segments, repeat = _merged(self.segments), self.repeat
        if len(segments) == 1:
            segments, repeat = [(segments[0][0], segments[0][1] * repeat)], 1
        elif segments and segments[0][0] == segments[-1][0]:
            segments, repeat = (
                _merged(segments * repeat),
                1,
            )  # the last run of a period joins the next one's first
        if len(segments) > 1:
            period = _shortest_period(segments)
            segments, repeat = segments[:period], repeat * (len(segments) // period)
        object.__setattr__(self, "segments", tuple(segments))
        object.__setattr__(self, "repeat", repeat if segments else 1)

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Runs:
        """Compress a plain sequence of run lengths."""
        return cls(tuple((int(length), 1) for length in lengths))

    @property
    def total(self) -> int:
        """Indices covered."""
        return self.repeat * sum(length * count for length, count in self.segments)

    def __len__(self) -> int:
        return self.repeat * sum(count for _, count in self.segments)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.repeat):
            for length, count in self.segments:
                for _ in range(count):
                    yield length

    def lengths(self) -> torch.Tensor:
        """The run lengths as an int64 tensor, [len(self)]."""
        pairs = torch.tensor(self.segments, dtype=torch.int64).reshape(-1, 2)
        return pairs[:, 0].repeat_interleave(pairs[:, 1]).repeat(self.repeat)


@dataclass(frozen=True, init=False)
class Layout:
    """How one tensor falls into blocks.

    Attributes:
        axis: the axis along which the runs lie.
        runs: the run lengths along ``axis``; they add up to its size.
        leading: sizes of the axes in front of ``axis`` that repeat the runs with blocks of their own.
        fold: pieces axis 0 is split into first (experts that one axis holds one behind the other); ``axis`` and
            ``leading`` speak of that view.
        note: what a reader should know about how the layout was reached; not part of its identity.

    Example:
        >>> Layout(axis=0, runs=[64] * 12).n_blocks                       # a query projection, per head
        12
        >>> Layout(axis=0, runs=[2, 2, 2, 2, 1, 1, 1, 1]).n_blocks        # fused [Q|K|V], values per row
        8
    """

    axis: int
    runs: Runs
    leading: tuple[int, ...] = ()
    fold: int = 1
    note: str = field(default="", compare=False)

    def __init__(
        self, axis: int, runs: Runs | Iterable[int], leading: Iterable[int] = (), note: str = "", fold: int = 1
    ) -> None:
        leading = tuple(int(size) for size in leading)
        if axis < len(leading):
            raise ValueError(f"axis={axis} must lie behind the {len(leading)} leading axes")
        if fold != 1 and (not leading or leading[0] != fold):
            raise ValueError(f"fold={fold} pieces must be the first leading axis; leading axes are {leading}")
        object.__setattr__(self, "axis", int(axis))
        object.__setattr__(self, "runs", runs if isinstance(runs, Runs) else Runs.of(runs))
        object.__setattr__(self, "leading", leading)
        object.__setattr__(self, "fold", int(fold))
        object.__setattr__(self, "note", note)

    @classmethod
    def per_element(cls, shape: tuple[int, ...]) -> Layout:
        """Every element its own block: Adam."""
        if not shape:
            return cls(0, Runs(((1, 1),)))
        return cls(len(shape) - 1, Runs(((1, shape[-1]),)), shape[:-1])

    @classmethod
    def per_tensor(cls, shape: tuple[int, ...]) -> Layout:
        """The whole tensor one block."""
        return cls(0, Runs(((shape[0], 1),) if shape and shape[0] else (((1, 1),) if not shape else ())))

    @property
    def n_blocks(self) -> int:
        """The number of second-moment scalars."""
        return prod(self.leading) * len(self.runs)

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape can have this layout."""
        shape = tuple(shape)
        if self.fold > 1 and (not shape or shape[0] % self.fold):
            return False
        shape = viewed(shape, self.fold)
        if not shape:
            return self.axis == 0 and not self.leading and self.runs.total == 1
        return (
            len(shape) > self.axis
            and shape[: len(self.leading)] == self.leading
            and shape[self.axis] == self.runs.total
        )

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Raise ValueError, with both numbers, when ``shape`` cannot have this layout."""
        shape = tuple(shape)
        if not self.fits(shape):
            raise ValueError(
                f"{what} has shape {shape}, but its layout holds {self.runs.total} indices along axis {self.axis}"
                f" behind leading axes {self.leading} (axis 0 in {self.fold} piece(s)); "
                "build the optimizer from the tensor as it is used in step()"
            )

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Shape of the aligned second moment, one value per index of the axis and of the leading axes.

        It broadcasts against the tensor; with ``fold`` > 1, after both have axis 0 split into (fold, rest).
        """
        view = viewed(tuple(shape), self.fold)
        kept = (*range(len(self.leading)), self.axis)
        aligned = tuple(size if dim in kept else 1 for dim, size in enumerate(view))
        return aligned if self.fold == 1 else (aligned[0] * aligned[1], *aligned[2:])

    def unfolded(self) -> Layout:
        """This layout, of the view in which axis 0 is split."""
        return self if self.fold == 1 else Layout(self.axis, self.runs, self.leading, self.note)

    def unfold(self, *tensors: _Held) -> list[_Held]:
        """Views in which axis 0 is split into (fold, rest), as ``axis`` and ``leading`` count it.

        Args:
            *tensors: of the tensor's shape or the aligned one; None stays None. Without a fold they are returned as
                they are. Splitting an axis never copies, whatever the strides.
        """
        if self.fold == 1:
            return list(tensors)
        return [t if t is None else t.unflatten(0, (self.fold, -1)) for t in tensors]

    def segments(self, aligned: torch.Tensor) -> Iterator[torch.Tensor]:
        """Views of an aligned second moment, the runs of one length at a time.

        Args:
            aligned: contiguous, ``aligned_shape`` of a layout without a fold.

        Yields:
            [..., count, length]: one run per index of the axis before the last.
        """
        # Every other axis has size 1 or leads, so this view is the sequence of runs, once per leading index.
        flat = aligned.view(-1, self.runs.repeat, self.runs.total // self.runs.repeat)
        start = 0
        for length, count in self.runs.segments:
            yield flat[..., start : start + length * count].unflatten(-1, (count, length))
            start += length * count

    def refines(self, other: Layout, shape: Iterable[int]) -> bool:
        """Whether every block of this layout lies inside one of the other's.

        Args:
            other: a layout of the same tensor.
            shape: the tensor's shape.

        Returns:
            True only where that is certain: layouts that split axis 0 differently count as not refining each other,
            unless the other has one block.
        """
        shape = tuple(shape)
        if other.n_blocks <= 1:
            return True
        if self.fold != other.fold:
            return False
        view = viewed(shape, self.fold)
        single = len(self.runs) == self.runs.total  # every index of the axis has a block of its own
        fixed = {*range(len(self.leading)), *((self.axis,) if single else ())}
        if any(size > 1 and dim not in fixed for dim, size in enumerate(view[: len(other.leading)])):
            return False
        if other.axis in fixed or len(other.runs) <= 1:
            return True
        ends, others = (layout.runs.lengths().cumsum(0) for layout in (self, other))
        return self.axis == other.axis and bool(torch.isin(others, ends).all())

    def numel_per_index(self, shape: Iterable[int]) -> int:
        """How many elements share one index of the axis (and of the leading axes)."""
        shape = tuple(shape)
        return prod(shape) // max(1, prod(self.aligned_shape(shape)))

    def block_ids(self, shape: Iterable[int]) -> torch.Tensor:
        """The block of every element.

        Args:
            shape: the tensor's shape.

        Returns:
            int64 tensor of that shape; blocks are numbered 0, 1, ... in order of (row-major) appearance.

        Raises:
            ValueError: the shape cannot have this layout.
        """
        shape = tuple(shape)
        self.require(shape)
        if not shape:
            return torch.zeros((), dtype=torch.int64)
        lengths = self.runs.lengths()
        along = torch.arange(len(lengths)).repeat_interleave(lengths)
        outer = torch.arange(prod(self.leading)).unsqueeze(1) * len(lengths)
        view = viewed(shape, self.fold)
        return (outer + along).reshape(self.unfolded().aligned_shape(view)).expand(view).reshape(shape).contiguous()
