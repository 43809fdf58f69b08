"""The column means of factored parameters on one rank: which elements they average, and which ranks share them.

A column of a part extends over all rows of the part, so ranks that hold different rows share it. A row extends over all
columns, so ranks that hold different columns share it; ``Geometry.cut`` describes the rows, as it does any blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout, TensorLayout
from ..partition.roles import viewed
from ..step.dtypes import second_moment_dtype
from ..step.update import sum_of_squares
from .geometry import Box, Geometry, Placed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def consecutive(labels: Tensor) -> list[tuple[int, int, int]]:
    """Return (label, first index, number of indices) of consecutive equal labels."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    starts = counts.cumsum(0) - counts
    return list(zip(values.tolist(), starts.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one part in one box of the local tensor.

    Attributes:
        box: index of the box.
        dim: axis of the rows in the box's unfolded view.
        start: first row in that view.
        length: number of rows.
        slices: (axis, first index, number of indices) of their columns in the view of ``Matrices``.
        one_axis: whether the box's view has a single axis, so that all its elements are in one column.
    """

    box: int
    dim: int
    start: int
    length: int
    slices: tuple[tuple[int, int, int], ...]
    one_axis: bool = False

    def rows(self, view: Tensor) -> Tensor:
        """Return the rows of a tensor that has the box's unfolded shape, or its aligned shape."""
        return view.narrow(self.dim, self.start, self.length)

    def columns(self, view: Tensor) -> Tensor:
        """Return the columns in a view of ``Matrices``, or their means; the result broadcasts against the rows."""
        for dim, start, length in self.slices:
            if view.size(dim) > 1 or start == 0:
                view = view.narrow(dim, start, min(length, view.size(dim)))
        return view.reshape(1) if self.one_axis else view


@dataclass(frozen=True, eq=False)
class Matrices:
    """The column means of one factored tensor on this rank, as a view of the local state.

    Attributes:
        offset: index of the first value in the flattened local state.
        shape: shape of the view; ``axis`` has one index per part.
        axis: the axis of the parts.
        leading: number of first axes whose indices have means of their own.
        sizes: number of rows of each part on all ranks together, float64, in a shape that broadcasts against the view.
        columns: number of columns on all ranks together.
        pieces: the rows of the local tensor.
        free: whether the tensor is a free box, so that an engine updates its means.
    """

    offset: int
    shape: tuple[int, ...]
    axis: int
    leading: int
    sizes: Tensor
    columns: int
    pieces: tuple[Piece, ...]
    free: bool = False

    @classmethod
    def whole(
        cls, layout: FactoredLayout, view: tuple[int, ...], offset: int = 0, box: int = 0, *, free: bool = False
    ) -> Matrices:
        """Return the column means of a tensor that is a single box.

        Args:
            layout: its layout, unfolded.
            view: its shape, unfolded.
            offset: the attribute.
            box: index of the box.
            free: the attribute.
        """
        return cls(
            offset=offset,
            shape=layout.columns_shape(view),
            axis=layout.axis,
            leading=len(layout.leading),
            sizes=layout.part_sizes().double().reshape([-1 if d == layout.axis else 1 for d in range(len(view))]),
            columns=layout.columns,
            pieces=tuple(
                Piece(box, layout.axis, start, count, ((layout.axis, part, 1),))
                for part, start, count in layout.pieces()
            ),
            free=free,
        )

    def of(self, state: Tensor) -> Tensor:
        """Return the view of a contiguous tensor with the values of the local state."""
        return state.reshape(-1)[self.offset : self.offset + prod(self.shape)].view(self.shape)

    def mean(self, state: Tensor) -> Tensor:
        """Return the share of this rank's columns in the mean over all columns; reduced axes have size 1."""
        reduced = [dim for dim in range(self.leading, len(self.shape)) if dim != self.axis]
        return self.of(state).sum(reduced, keepdim=True) / self.columns


@dataclass(frozen=True, eq=False)
class Columns:
    """The column means of a parameter on this rank.

    Attributes:
        shape: shape of the local state.
        matrices: the factored tensors that the parameter contains.
        slots: indices of shared values in the flattened local state, int64 [k].
        positions: indices of the same values in the message, int64 [k].
        size: number of values in the message.
        mean_positions: index in the message of each of this rank's means over all columns, int64.
        mean_size: number of means in the message.
        groups: process groups over which columns are summed.
        row_groups: process groups over which rows are summed, and with them the mean over all columns.
        device: device on which the groups communicate.
        placed: the placement of a DTensor parameter's column means; None for plain tensors.
        local: the layout of the local tensor of a DTensor, if that is a single box; None otherwise.
    """

    shape: tuple[int, ...]
    matrices: tuple[Matrices, ...]
    slots: Tensor
    positions: Tensor
    size: int
    mean_positions: Tensor
    mean_size: int
    groups: tuple[ProcessGroup, ...]
    row_groups: tuple[ProcessGroup, ...]
    device: torch.device
    placed: Placed | None = None
    local: FactoredLayout | None = None

    @property
    def all_groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups that share rows or columns."""
        return (*self.groups, *(group for group in self.row_groups if group not in self.groups))

    @cached_property
    def divided(self) -> Columns:
        """The same column means without the tensors that are free boxes."""
        divided = tuple(matrices for matrices in self.matrices if not matrices.free)
        return self if len(divided) == len(self.matrices) else replace(self, matrices=divided)

    @property
    def sent(self) -> list[tuple[int, tuple[ProcessGroup, ...]]]:
        """What this rank sends in a step for its columns: (number of numbers, process groups)."""
        out = [(self.size, self.groups)]
        if self.row_groups:  # the means over all columns, before the step and of the gradient
            out += [(self.mean_size, self.row_groups), (self.mean_size, self.all_groups)]
        return out

    def second_moment(self, values: Tensor) -> Tensor:
        """Return the state tensor for local values: a DTensor if the parameter is one, else the values themselves."""
        return values if self.placed is None else self.placed.wrap(values)

    def shares(self, boxes: Sequence[Box], grad: Tensor | None, like: Tensor) -> Tensor:
        """Return this rank's share of the mean of grad**2 over each column, flattened; zeros for free boxes.

        Args:
            boxes: the boxes of the local tensor.
            grad: local gradient; None counts as zeros.
            like: a tensor on the device and with the dtype of the result.
        """
        sums = like.new_zeros(prod(self.shape))
        for matrices in self.divided.matrices if grad is not None else ():
            view = matrices.of(sums)
            for piece in matrices.pieces:
                box = boxes[piece.box]
                (elements,) = box.layout.unfold(box.of(grad))  # type: ignore[arg-type]
                rows, target = piece.rows(elements), piece.columns(view)
                shape = (*rows.shape[: piece.dim], 1, *rows.shape[piece.dim + 1 :])
                target.add_(sum_of_squares(rows, shape, (piece.dim,), second_moment_dtype(rows)).view(target.shape))
            view.div_(matrices.sizes.to(view))
        return sums

    def mean(self, state: Tensor) -> Tensor:
        """Return the shares of this rank's columns in the means over all columns of each part, joined and flattened."""
        if not self.matrices:
            return state.new_zeros(0)
        return torch.cat([matrices.mean(state).flatten() for matrices in self.matrices])

    def means(self, joined: Tensor) -> Iterator[Tensor]:
        """Yield the means of each of ``matrices`` from the result of ``mean``, in a shape that broadcasts."""
        start = 0
        for matrices in self.matrices:
            shape = tuple(
                size if dim < matrices.leading or dim == matrices.axis else 1 for dim, size in enumerate(matrices.shape)
            )
            yield joined[start : start + prod(shape)].view(shape)
            start += prod(shape)


def unsharded(layout: TensorLayout, shape: tuple[int, ...]) -> Geometry:
    """Return the geometry of a whole parameter in one process.

    Args:
        layout: its layout.
        shape: its shape.
    """
    aligned = layout.aligned_shape(shape)
    if not isinstance(layout, FactoredLayout):
        return Geometry(shape, (Box(layout),), aligned)
    nothing = torch.zeros(0, dtype=torch.int64)
    matrices = Matrices.whole(layout.unfolded(), viewed(shape, layout.fold))
    columns = Columns(
        layout.columns_shape(shape), (matrices,), nothing, nothing, 0, nothing, 0, (), (), torch.device("cpu")
    )
    return Geometry(shape, (Box(layout, factored=True),), aligned, columns=columns)
