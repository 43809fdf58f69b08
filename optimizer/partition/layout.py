"""Layouts: the blocks of a tensor as contiguous runs of indices along one axis.

All elements whose index along the axis lies in one run, and whose indices along the leading axes are equal, share one
second-moment scalar. This representation covers every supported partition, including those of fused projections and
of experts, and every shard of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from .roles import viewed

if TYPE_CHECKING:
    from .factored import FactoredLayout

_MaybeTensor = TypeVar("_MaybeTensor", torch.Tensor, torch.Tensor | None)


class AnyLayout(Protocol):
    """The form of a second moment.

    It is a ``Layout`` of blocks, a ``partition.factored.FactoredLayout`` of rows and columns, or a
    ``sharding.flat.FlatLayout`` for flattened parameters.
    """

    @property
    def n_blocks(self) -> int:
        """The number of second-moment scalars."""

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a tensor of this shape can have this layout."""

    def require(self, shape: Iterable[int], what: str = "tensor") -> None:
        """Raise ValueError if a tensor of this shape cannot have this layout; ``what`` names it in the message."""

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the second moment of a tensor of this shape."""

    def columns_shape(self, shape: Iterable[int]) -> tuple[int, ...] | None:
        """Return the shape of the column means, if the second moment is factored; otherwise None."""


def _merged(segments: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent segments of equal run length and remove empty ones."""
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
    """Return the shortest p such that ``items`` is ``items[:p]`` repeated (by Knuth-Morris-Pratt borders)."""
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
    """A compressed sequence of run lengths.

    The segments are expanded in order, ``count`` runs of ``length`` each, and the result is repeated ``repeat``
    times. Two ``Runs`` with the same sequence of lengths are equal, because construction normalises them.

    Attributes:
        segments: (length, count) pairs, in order.
        repeat: how often the sequence of segments repeats.

    Raises:
        ValueError: a length or ``repeat`` is less than 1, or a count is negative.
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
            # The last segment of each repetition and the first of the next have the same run length.
            segments, repeat = _merged(segments * repeat), 1
        if len(segments) > 1:
            period = _shortest_period(segments)
            segments, repeat = segments[:period], repeat * (len(segments) // period)
        object.__setattr__(self, "segments", tuple(segments))
        object.__setattr__(self, "repeat", repeat if segments else 1)

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Runs:
        """Compress a sequence of run lengths."""
        return cls(tuple((int(length), 1) for length in lengths))

    @property
    def total(self) -> int:
        """The number of indices in all runs together."""
        return self.repeat * sum(length * count for length, count in self.segments)

    def __len__(self) -> int:
        return self.repeat * sum(count for _, count in self.segments)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.repeat):
            for length, count in self.segments:
                for _ in range(count):
                    yield length

    def lengths(self) -> torch.Tensor:
        """Return the run lengths as an int64 tensor of shape [len(self)]."""
        pairs = torch.tensor(self.segments, dtype=torch.int64).reshape(-1, 2)
        return pairs[:, 0].repeat_interleave(pairs[:, 1]).repeat(self.repeat)


@dataclass(frozen=True, init=False)
class Layout:
    """The blocks of one tensor: the sets of elements that share one second-moment scalar.

    Attributes:
        axis: the axis along which the runs lie.
        runs: the run lengths along ``axis``; they add up to its size. Each run is a block.
        leading: sizes of the first axes, in front of ``axis``. Every index of these axes has blocks of its own.
        fold: the number of equal pieces that axis 0 is split into first, for tensors that concatenate experts along
            axis 0; 1 for no split. ``axis`` and ``leading`` count the axes after the split.
        note: how the layout differs from what the rules ask for; ignored when layouts are compared.
        factored: how the tensor would be factored, which converting a factored second moment to this layout needs;
            None if that is unknown or the tensor is no matrix. Ignored when layouts are compared.

    Raises:
        ValueError: ``axis`` is one of the leading axes, or ``fold`` is not the size of the first leading axis.

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
    factored: FactoredLayout | None = field(default=None, compare=False, repr=False)

    def __init__(
        self, axis: int, runs: Runs | Iterable[int], leading: Iterable[int] = (), note: str = "", fold: int = 1
    ) -> None:
        leading = tuple(int(size) for size in leading)
        if axis < len(leading):
            raise ValueError(f"axis={axis} must come after the {len(leading)} leading axes")
        if fold != 1 and (not leading or leading[0] != fold):
            raise ValueError(f"fold={fold} pieces must be the first leading axis; leading axes are {leading}")
        object.__setattr__(self, "axis", int(axis))
        object.__setattr__(self, "runs", runs if isinstance(runs, Runs) else Runs.of(runs))
        object.__setattr__(self, "leading", leading)
        object.__setattr__(self, "fold", int(fold))
        object.__setattr__(self, "note", note)

    @classmethod
    def per_element(cls, shape: tuple[int, ...]) -> Layout:
        """Return a layout in which every element is a block, as in Adam.

        Args:
            shape: the tensor's shape.
        """
        if not shape:
            return cls(0, Runs(((1, 1),)))
        return cls(len(shape) - 1, Runs(((1, shape[-1]),)), shape[:-1])

    @classmethod
    def per_tensor(cls, shape: tuple[int, ...]) -> Layout:
        """Return a layout in which the whole tensor is one block.

        Args:
            shape: the tensor's shape.
        """
        return cls(0, Runs(((shape[0], 1),) if shape and shape[0] else (((1, 1),) if not shape else ())))

    def described(self, note: str | None = None, factored: FactoredLayout | None = None) -> Layout:
        """Return the same layout with a note, and with how the tensor would be factored; None keeps what there is."""
        layout = Layout(self.axis, self.runs, self.leading, self.note if note is None else note, self.fold)
        object.__setattr__(layout, "factored", self.factored if factored is None else factored)
        return layout

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
                f"{what} has shape {shape}, but its layout holds {self.runs.total} indices along axis {self.axis}"
                f" after leading axes {self.leading} (axis 0 in {self.fold} piece(s)); "
                "build the optimizer from the tensor as it is used in step()"
            )

    def aligned_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the second moment: one value per index of ``axis`` and of the leading axes.

        It broadcasts against the tensor. With ``fold`` > 1, it does so after axis 0 of both is split into (fold, rest).

        Args:
            shape: the tensor's shape.
        """
        view = viewed(tuple(shape), self.fold)
        block_axes = (*range(len(self.leading)), self.axis)
        aligned = tuple(size if dim in block_axes else 1 for dim, size in enumerate(view))
        return aligned if self.fold == 1 else (aligned[0] * aligned[1], *aligned[2:])

    def columns_shape(self, shape: Iterable[int]) -> None:
        """Return None: a second moment with one scalar per block has no column means."""

    def unfolded(self) -> Layout:
        """Return the same layout for the view of the tensor in which axis 0 is already split."""
        return self if self.fold == 1 else Layout(self.axis, self.runs, self.leading, self.note)

    def unfold(self, *tensors: _MaybeTensor) -> list[_MaybeTensor]:
        """Return views of tensors in which axis 0 is split into (fold, rest).

        Nothing is copied, whatever the strides. With ``fold`` = 1 the tensors are returned unchanged.

        Args:
            *tensors: tensors of the parameter's shape or of the aligned shape; None is returned as None.
        """
        if self.fold == 1:
            return list(tensors)
        return [t if t is None else t.unflatten(0, (self.fold, -1)) for t in tensors]

    def segments(self, aligned: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield views of an aligned second moment, one for each segment of runs of equal length.

        Args:
            aligned: a contiguous tensor of the aligned shape; ``fold`` must be 1.

        Yields:
            A view [..., count, length]: each index of the second-to-last axis is one run.
        """
        # All axes other than ``axis`` and the leading ones have size 1, so this view contains the sequence of runs
        # once per leading index.
        flat = aligned.view(-1, self.runs.repeat, self.runs.total // self.runs.repeat)
        start = 0
        for length, count in self.runs.segments:
            yield flat[..., start : start + length * count].unflatten(-1, (count, length))
            start += length * count

    def refines(self, other: Layout, shape: Iterable[int]) -> bool:
        """Whether every block of this layout lies inside one block of another layout.

        Args:
            other: a layout of the same tensor.
            shape: the tensor's shape.

        Returns:
            True only if this is certain. If the layouts have different ``fold``, the result is False, unless
            ``other`` has a single block.
        """
        shape = tuple(shape)
        if other.n_blocks <= 1:
            return True
        if self.fold != other.fold:
            return False
        view = viewed(shape, self.fold)
        single = len(self.runs) == self.runs.total  # every index of the axis has a block of its own
        # Elements of one block have equal indices along these axes.
        fixed = {*range(len(self.leading)), *((self.axis,) if single else ())}
        if any(size > 1 and dim not in fixed for dim, size in enumerate(view[: len(other.leading)])):
            return False
        if other.axis in fixed or len(other.runs) <= 1:
            return True
        ends, other_ends = (layout.runs.lengths().cumsum(0) for layout in (self, other))
        return self.axis == other.axis and bool(torch.isin(other_ends, ends).all())

    def numel_per_index(self, shape: Iterable[int]) -> int:
        """Return how many elements have the same index along ``axis`` and the leading axes.

        Args:
            shape: the tensor's shape.
        """
        shape = tuple(shape)
        return prod(shape) // max(1, prod(self.aligned_shape(shape)))

    def block_ids(self, shape: Iterable[int]) -> torch.Tensor:
        """Return the block number of every element.

        Args:
            shape: the tensor's shape.

        Returns:
            An int64 tensor of that shape. Blocks are numbered 0, 1, ... in the order of their first elements in
            row-major order.

        Raises:
            ValueError: a tensor of this shape cannot have this layout.
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
