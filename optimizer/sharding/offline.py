"""Compute the shards of any rank of any number of ranks in a single process.

A geometry needs the ranks of a mesh but does not communicate with them, so ``Mesh`` and ``Held`` can be used instead of
torch's ``DeviceMesh`` and ``DTensor``. This module computes how torch and ZeRO shard tensors: by chunks, with padding,
in sub-groups. Which blocks the shards cut, and which second moments a rank stores, is computed by ``placed`` and
``flat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .flat import within

SUB_GROUP = 10**9
"""Number of elements per rank at which ZeRO-3 ends a sub-group by default. It steps sub-groups one at a time."""
ALIGNMENT = 2
"""ZeRO-1 and ZeRO-2 pad the flattened tensors of a group to a multiple of this many elements per rank."""


@dataclass(frozen=True)
class Mesh:
    """A device mesh as one of its ranks sees it.

    Attributes:
        shape: number of ranks along every dimension.
        coordinate: the rank's index along every dimension.
        device_type: type of the mesh's devices, as in torch.
    """

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    device_type: str = "cpu"

    @property
    def mesh(self) -> Tensor:
        """The ranks as an int64 tensor of the mesh's shape."""
        return torch.arange(prod(self.shape)).view(self.shape)

    def get_coordinate(self) -> list[int]:
        """Return the rank's index along every dimension."""
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        """Return the number of ranks along a dimension."""
        return self.shape[dim]

    def get_group(self, dim: int) -> int:
        """Return the dimension's number, which is used instead of the process group along the dimension."""
        return dim


@dataclass(frozen=True)
class Held:
    """A DTensor without values.

    Attributes:
        shape: shape of the whole tensor.
        device_mesh: mesh on which the tensor is placed, as in a DTensor.
        placements: placement for every dimension of the mesh, as in a DTensor.
        local: shape of the shard of the mesh's rank.
    """

    shape: tuple[int, ...]
    device_mesh: Mesh
    placements: tuple[Any, ...]
    local: tuple[int, ...]

    def to_local(self) -> Tensor:
        """Return the rank's shard as a tensor on the meta device."""
        return torch.empty(self.local, device="meta")


def chunk(shape: tuple[int, ...], dim: int, ways: int, index: int) -> tuple[int, ...]:
    """Return the shape of a chunk of ``torch.chunk``, whose size along ``dim`` is 0 if torch makes fewer chunks."""
    chunks = torch.empty(shape, device="meta").chunk(ways, dim)
    return tuple(chunks[index].shape) if index < len(chunks) else (*shape[:dim], 0, *shape[dim + 1 :])


def place(shape: tuple[int, ...], axis: int | None, mesh: Mesh) -> Held:
    """Place a tensor on a (data-parallel, tensor-parallel) mesh.

    Args:
        shape: shape of the whole tensor.
        axis: axis that tensor parallelism shards; None if it replicates the tensor.
        mesh: mesh of two dimensions. After tensor parallelism, FSDP2 shards axis 0 along the mesh's first dimension.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    tp: Any = Replicate() if axis is None or mesh.shape[1] == 1 else Shard(axis)
    dp = _StridedShard(0, split_factor=mesh.shape[1]) if tp == Shard(0) else Shard(0)
    local = shape if isinstance(tp, Replicate) else chunk(shape, tp.dim, mesh.shape[1], mesh.coordinate[1])
    local = chunk(local, 0, mesh.shape[0], mesh.coordinate[0])
    return Held(shape, mesh, (dp, tp), local)


def share(numel: int, ranks: int) -> int:
    """Return the number of elements of each rank's part of a tensor that ZeRO-3 pads and divides equally."""
    return -(-numel // ranks)


def part(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return [start, stop) of a rank's elements, without padding, of a flattened tensor sharded by ZeRO-3."""
    size = share(numel, ranks)
    return within(0, numel, rank * size, (rank + 1) * size)


@dataclass(frozen=True)
class Buffer:
    """A concatenation of flattened tensors that is divided equally among ranks.

    Attributes:
        starts: index of each tensor's first element.
        size: number of elements of each rank, including padding.
    """

    starts: tuple[int, ...]
    size: int

    def parts(self, i: int, numel: int) -> dict[int, tuple[int, int]]:
        """Return rank -> [start, stop) of its elements of tensor ``i``, for the ranks that have any, in order."""
        start, stop = self.starts[i], self.starts[i] + numel
        ranks = range(start // self.size, -(-stop // self.size)) if numel else ()
        return {rank: within(start, stop, rank * self.size, (rank + 1) * self.size) for rank in ranks}


def joined(numels: Sequence[int], ranks: int, *, align: int = 1, multiple: int = 1) -> Buffer:
    """Join tensors to one buffer, as ZeRO-1, ZeRO-2 and FSDP1 do.

    Args:
        numels: number of elements of each tensor.
        ranks: number of ranks that share the buffer.
        align: every tensor starts at a multiple of this number of elements.
        multiple: every rank has a multiple of this number of elements.
    """
    starts, stop = [], 0
    for numel in numels:
        starts.append(-(-stop // align) * align)
        stop = starts[-1] + numel
    return Buffer(tuple(starts), -(-stop // (multiple * ranks)) * multiple)


def sub_groups(numels: Sequence[int], ranks: int, limit: int = SUB_GROUP) -> list[range]:
    """Divide the tensors of a parameter group into the sub-groups that ZeRO-3 steps one at a time.

    Args:
        numels: number of elements of each tensor of the group.
        ranks: number of ranks that share each tensor.
        limit: a sub-group ends with the tensor at which a rank has this number of elements.

    Returns:
        Indices of the tensors of each sub-group.
    """
    out, first, elements = [], 0, 0
    for i, numel in enumerate(numels):
        elements += share(numel, ranks)
        if elements >= limit or i == len(numels) - 1:
            out.append(range(first, i + 1))
            first, elements = i + 1, 0
    return out
