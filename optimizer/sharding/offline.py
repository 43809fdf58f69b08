"""A mesh, a DTensor and flattened tensors without processes: one process can ask what any rank of thousands holds.

A geometry needs to know which ranks a mesh has. It does not need to talk to them, so ``Mesh`` and ``Held`` can take the
place of torch's classes. This file says how torch and ZeRO cut tensors: in chunks, with padding, in sub-groups. Only
``placed`` and ``flat`` say which blocks a cut goes through, and which second moments a rank keeps.
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
"""Elements of one rank that ZeRO-3 steps at a time, by default."""
ALIGNMENT = 2
"""ZeRO-1 and ZeRO-2 pad the flattened tensors of a group to a multiple of this many elements per rank."""


@dataclass(frozen=True)
class Mesh:
    """A device mesh as one of its ranks sees it.

    Attributes:
        shape: ranks along every dimension.
        coordinate: of the rank.
        device_type: of its devices.
    """

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    device_type: str = "cpu"

    @property
    def mesh(self) -> Tensor:
        """The numbers of the ranks, int64 tensor of the mesh's shape."""
        return torch.arange(prod(self.shape)).view(self.shape)

    def get_coordinate(self) -> list[int]:
        """The rank's coordinate."""
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        """Ranks along a dimension."""
        return self.shape[dim]

    def get_group(self, dim: int) -> int:
        """The number of the dimension, in place of the process group along it."""
        return dim


@dataclass(frozen=True)
class Held:
    """A DTensor without values.

    Attributes:
        shape: of the whole tensor.
        device_mesh, placements: as a DTensor's.
        local: shape of what the mesh's rank holds.
    """

    shape: tuple[int, ...]
    device_mesh: Mesh
    placements: tuple[Any, ...]
    local: tuple[int, ...]

    def to_local(self) -> Tensor:
        """What the rank holds, without values."""
        return torch.empty(self.local, device="meta")


def chunk(shape: tuple[int, ...], dim: int, ways: int, index: int) -> tuple[int, ...]:
    """The shape of one chunk of ``torch.chunk``; of size 0 where there are fewer chunks than ways."""
    chunks = torch.empty(shape, device="meta").chunk(ways, dim)
    return tuple(chunks[index].shape) if index < len(chunks) else (*shape[:dim], 0, *shape[dim + 1 :])


def place(shape: tuple[int, ...], axis: int | None, mesh: Mesh) -> Held:
    """A tensor on a (data-parallel, tensor-parallel) mesh.

    Args:
        shape: of the whole tensor.
        axis: what tensor parallelism cuts first; None leaves the tensor whole.
        mesh: of two dimensions. FSDP2 cuts axis 0 along the first one.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    tp: Any = Replicate() if axis is None or mesh.shape[1] == 1 else Shard(axis)
    dp = _StridedShard(0, split_factor=mesh.shape[1]) if tp == Shard(0) else Shard(0)
    local = shape if isinstance(tp, Replicate) else chunk(shape, tp.dim, mesh.shape[1], mesh.coordinate[1])
    local = chunk(local, 0, mesh.shape[0], mesh.coordinate[0])
    return Held(shape, mesh, (dp, tp), local)


def share(numel: int, ranks: int) -> int:
    """Elements of one rank where a flattened tensor is padded and dealt out in equal parts (ZeRO-3)."""
    return -(-numel // ranks)


def part(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """[start, stop) of the elements that a rank holds of such a tensor, padding left out."""
    size = share(numel, ranks)
    return within(0, numel, rank * size, (rank + 1) * size)


@dataclass(frozen=True)
class Buffer:
    """Flattened tensors one behind the other, of which every rank has an equal part.

    Attributes:
        starts: where each tensor begins.
        size: elements of one rank, padding included.
    """

    starts: tuple[int, ...]
    size: int

    def parts(self, i: int, numel: int) -> dict[int, tuple[int, int]]:
        """The ranks that hold elements of tensor ``i``, ascending: each rank's [start, stop) of the tensor."""
        start, stop = self.starts[i], self.starts[i] + numel
        ranks = range(start // self.size, -(-stop // self.size)) if numel else ()
        return {rank: within(start, stop, rank * self.size, (rank + 1) * self.size) for rank in ranks}


def joined(numels: Sequence[int], ranks: int, *, align: int = 1, multiple: int = 1) -> Buffer:
    """Tensors of these sizes in one buffer (ZeRO-1, ZeRO-2, FSDP1).

    Args:
        numels: elements of each.
        ranks: that share the buffer.
        align: what the place of a tensor's first element is a multiple of.
        multiple: what a rank's number of elements is a multiple of.
    """
    starts, at = [], 0
    for numel in numels:
        starts.append(-(-at // align) * align)
        at = starts[-1] + numel
    return Buffer(tuple(starts), -(-at // (multiple * ranks)) * multiple)


def sub_groups(numels: Sequence[int], ranks: int, limit: int = SUB_GROUP) -> list[range]:
    """Which tensors of a group ZeRO-3 steps together.

    Args:
        numels: elements of the group's tensors.
        ranks: that share each of them.
        limit: a sub-group ends with the tensor that gives a rank so many elements.
    """
    out, first, elements = [], 0, 0
    for i, numel in enumerate(numels):
        elements += share(numel, ranks)
        if elements >= limit or i == len(numels) - 1:
            out.append(range(first, i + 1))
            first, elements = i + 1, 0
    return out
