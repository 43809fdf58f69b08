"""What a rank holds of a tensor, as the step needs it: boxes, their layouts, and the blocks that others share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..partition.layout import Layout
from .holdings import Ranges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True, eq=False)
class Box:
    """A box of the local elements: a slice of the local tensor's first axis, split into ``shape``.

    Attributes:
        start, stop: the slice; None for the whole local tensor as it is.
        shape: what the sliced axis is split into; None leaves it.
        layout: of the box.
        second: slice of the local second moment's first axis that belongs to the box; None for all of it.
        slots: the local block of each of the box's aligned values, int64; None for the whole local tensor.
        decays: whether weight decay applies.
        free: whether its blocks lie in it whole, so that an ordinary engine can take it, whatever the other boxes need.
    """

    layout: Layout
    start: int | None = None
    stop: int | None = None
    shape: tuple[int, ...] | None = None
    second: tuple[int, int] | None = None
    slots: Tensor | None = None
    decays: bool = True
    free: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The box as a view of the local tensor."""
        if self.start is None:
            return tensor
        box = tensor[self.start : self.stop]
        return box if self.shape is None else box.unflatten(0, self.shape)

    def of_second(self, second: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The box's values of the local second moment, aligned with a box of this shape."""
        if self.second is None:
            return second
        return second[self.second[0] : self.second[1]].view(self.layout.aligned_shape(shape))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks that a tensor with cut blocks has here.

    Attributes:
        counts: elements of each block on all ranks together, float64 [n].
        spread: the block of every value of the local second moment, int64 [numel]; None: value i is block i.
    """

    counts: Tensor
    spread: Tensor | None

    def at(self, values: Tensor | None) -> Tensor | None:
        """The blocks of these values of the local second moment; None: value i is block i."""
        if values is None:
            return self.spread
        return values if self.spread is None else self.spread[values.to(self.spread.device)]


@dataclass(frozen=True, eq=False)
class Cut:
    """The blocks that ranks share, and with whom.

    Attributes:
        groups: process groups to sum over, one after another, in the same order on all of their ranks; may be empty.
        size: shared blocks: what one rank sends for the tensor.
        slots: local blocks that are shared, int64 [k], k <= size.
        positions: their places among the shared ones, int64 [k].
        blocks: all local blocks.
        device: where the groups communicate.
        values: indices of the local second moment's values outside free boxes, int64; None for all.
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
    """How the second moment of a DTensor parameter is placed, and what of either a rank holds.

    Attributes:
        mesh, placements, shape: of the second moment.
        held: the parameter's indices here, by axis that is dealt out.
        held_second: the second moment's likewise.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    held: Mapping[int, Ranges]
    held_second: Mapping[int, Ranges]

    def wrap(self, local: Tensor) -> DTensor:
        """A DTensor of this rank's local tensor."""
        from torch.distributed.tensor import DTensor

        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a rank holds of one parameter, as the step needs it.

    Attributes:
        shape: of the local tensor.
        boxes: boxes the local elements consist of; one that is all of it wherever that is possible.
        aligned: shape of the local second moment.
        cut: how blocks are stepped that are shared with other ranks, or spread over several boxes; None where an
            ordinary engine can take it: there is one box, or none.
        placed: how the second moment of a DTensor parameter is placed; None for plain tensors.
        signature: everything that ranks must agree on, as text.
        sharding_groups: all groups that the tensor is dealt out over, whether they cut a block or not.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    aligned: tuple[int, ...]
    cut: Cut | None = None
    placed: Placed | None = None
    signature: str = ""
    sharding_groups: tuple[ProcessGroup, ...] = field(default=())

    @property
    def free(self) -> tuple[Box, ...]:
        """Parts that ordinary engines take beside those that share blocks."""
        return tuple(box for box in self.boxes if box.free)

    def second_moment(self, values: Tensor) -> Tensor:
        """The state tensor around local values: a DTensor where the parameter is one."""
        return values if self.placed is None else self.placed.wrap(values)
