"""The shard of a tensor that one rank stores: its boxes, their layouts, and the blocks it shares with other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout, TensorLayout
from .holdings import Ranges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    from .columns import Columns


@dataclass(frozen=True, eq=False)
class Box:
    """A box of the local elements: a slice of the local tensor's first axis, reshaped to ``shape``.

    Attributes:
        layout: the layout of the box.
        start: first index of the slice; None if the box is the whole local tensor.
        stop: end of the slice, exclusive; None if the box is the whole local tensor.
        shape: the axes into which the sliced axis is split; None if it stays one axis.
        second: the box's slice [start, stop) of the local second moment's first axis; None for all of it.
        slots: the local block of each aligned value of the box, int64; None for the whole local tensor.
        decays: whether weight decay applies.
        free: whether no block of the box has elements outside it. An ordinary engine can step such a box, even if
            other boxes of the tensor share blocks.
        factored: whether the box belongs to a tensor with a factored second moment; ``layout`` is that of its rows,
            unless the box is free and so the whole tensor.
        row: number of elements of the rows that share scales, if the first moment of a flattened tensor is quantised;
            an engine can then step the box only if they are its last axis, or its last axes if the box is a whole
            tensor. 0 otherwise.
        columns: the slice [start, stop) of a flat tensor's column means that belongs to a free factored box; None for
            other boxes.
    """

    layout: TensorLayout
    start: int | None = None
    stop: int | None = None
    shape: tuple[int, ...] | None = None
    second: tuple[int, int] | None = None
    slots: Tensor | None = None
    decays: bool = True
    free: bool = False
    factored: bool = False
    row: int = 0
    columns: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the box as a view of a local tensor."""
        if self.start is None:
            return tensor
        view = tensor[self.start : self.stop]
        return view if self.shape is None else view.unflatten(0, self.shape)

    def of_second(self, second: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the box's values of the local second moment, in the aligned shape of a box of shape ``shape``."""
        if self.second is None:
            return second
        return second[self.second[0] : self.second[1]].view(self.layout.aligned_shape(shape))

    def of_columns(self, columns: Tensor) -> Tensor:
        """Return the column means of a free factored box, in its layout's shape, from those of a flat tensor."""
        assert self.columns is not None and self.shape is not None and isinstance(self.layout, FactoredLayout)
        return columns[self.columns[0] : self.columns[1]].view(self.layout.columns_shape(self.shape))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks with elements on this rank, for a tensor some of whose blocks are shared.

    Attributes:
        counts: number of elements of each block on all ranks together, float64 [number of local blocks].
        spread: the block of every value of the local second moment, int64 [numel]. None if value i is block i.
    """

    counts: Tensor
    spread: Tensor | None

    def at(self, values: Tensor | None) -> Tensor | None:
        """Return the blocks of the local second moment's values at these indices; None if value i is block i."""
        if values is None:
            return self.spread
        return values if self.spread is None else self.spread[values.to(self.spread.device)]


@dataclass(frozen=True, eq=False)
class Cut:
    """The blocks that this rank shares with other ranks, and the process groups to sum them over.

    Attributes:
        groups: process groups to sum over, one after another, in the same order on all of their ranks. Empty if no
            block is shared with another rank.
        size: number of shared blocks, which is the number of values that a rank sends for the tensor.
        slots: indices of the shared blocks among the local blocks, int64 [k], k <= size.
        positions: indices of the same blocks in the message, int64 [k].
        blocks: all local blocks.
        device: device on which the groups communicate.
        values: indices of the local second moment's values outside free boxes, int64; None for all values.
    """

    groups: tuple[ProcessGroup, ...]
    size: int
    slots: Tensor
    positions: Tensor
    blocks: Blocks
    device: torch.device
    values: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """The placement of a DTensor parameter's second moment, and the indices of both tensors on this rank.

    Attributes:
        mesh: device mesh of the second moment.
        placements: placements of the second moment.
        shape: global shape of the second moment.
        held: for each sharded axis of the parameter, the indices that this rank stores.
        held_second: for each sharded axis of the second moment, the indices that this rank stores.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    held: Mapping[int, Ranges]
    held_second: Mapping[int, Ranges]

    def wrap(self, local: Tensor) -> DTensor:
        """Return the second moment as a DTensor, from this rank's local tensor."""
        from torch.distributed.tensor import DTensor

        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )


@dataclass(frozen=True, eq=False)
class Geometry:
    """The shard of one parameter that a rank stores.

    Attributes:
        shape: shape of the local tensor.
        boxes: the boxes that the local elements consist of; a single box for the whole tensor wherever possible.
        aligned: shape of the local second moment.
        cut: how to step blocks that are shared with other ranks or spread over several boxes. None if an ordinary
            engine can step the shard: it has one box or none.
        placed: the placement of a DTensor parameter's second moment; None for plain tensors.
        signature: everything that ranks must agree on, as text.
        sharding_groups: all process groups that the tensor is sharded over, whether they cut a block or not.
        columns: the column means, if the second moment is factored, and then ``aligned``, ``cut`` and ``placed`` are
            those of the row means. None if it is not.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    aligned: tuple[int, ...]
    cut: Cut | None = None
    placed: Placed | None = None
    signature: str = ""
    sharding_groups: tuple[ProcessGroup, ...] = field(default=())
    columns: Columns | None = None

    @property
    def free(self) -> tuple[Box, ...]:
        """The boxes that ordinary engines step although other boxes of the tensor share blocks."""
        return tuple(box for box in self.boxes if box.free)

    @property
    def sent(self) -> list[tuple[int, tuple[ProcessGroup, ...]]]:
        """What this rank sends in a step: (number of numbers, process groups), without the count of gradients."""
        rows = [] if self.cut is None else [(self.cut.size, self.cut.groups)]
        return rows if self.columns is None else rows + self.columns.sent

    def second_moment(self, values: Tensor) -> Tensor:
        """Return the state tensor for local values: a DTensor if the parameter is one, else the values themselves."""
        return values if self.placed is None else self.placed.wrap(values)
