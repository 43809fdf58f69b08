"""What one rank's optimizer sends in a step, from the library's own geometries of real layouts.

A DTensor's geometry needs to know of its mesh which ranks it has, not how to talk to them: ``Mesh`` and ``Held`` stand
for the two, so that every rank of thousands can be asked in one process. How a rank's share is cut is torch's and
DeepSpeed's doing and is spelt out here by itself (``torch.chunk``, padding, sub-groups); which blocks that cuts is
answered by ``optimizer.sharding`` alone. Equal tensors (layers of a model) are asked once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from benchmarks.scaling.weights import Weight
from optimizer.partition import Layout
from optimizer.sharding.flat import Range, flat_geometry, within
from optimizer.sharding.placed import placed_geometry

SUB_GROUP = 10**9
"""DeepSpeed's default ``sub_group_size``: local elements of ZeRO-3 that are stepped at a time."""
_ALIGNMENT = 2
"""Elements per rank that ZeRO 1 and 2 pad a flattened group to."""
_FSDP1_BYTES = 16
"""What FSDP1 aligns original parameters to."""


@dataclass
class Message:
    """One all-reduce of one rank.

    Attributes:
        ranks: in its group.
        along: the mesh dimension the group runs along.
        blocks: sums of shared blocks sent, by the role of their tensor.
        tensors: tensors with shared blocks: one number more for each.
    """

    ranks: int
    along: str
    blocks: Counter[str] = field(default_factory=Counter)
    tensors: int = 0

    @property
    def numbers(self) -> int:
        """Numbers sent."""
        return self.blocks.total() + self.tensors

    def add(self, role: str, blocks: int, times: int = 1) -> None:
        """Let ``times`` equal tensors with so many shared blocks take part."""
        self.blocks[role] += blocks * times
        self.tensors += times


@dataclass(frozen=True)
class Mesh:
    """A device mesh as one of its ranks sees it, without processes."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    device_type: str = "cpu"

    @property
    def mesh(self) -> Tensor:
        """Ranks."""
        return torch.arange(prod(self.shape)).view(self.shape)

    def get_coordinate(self) -> list[int]:
        """This rank's."""
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        """Ranks along a dimension."""
        return self.shape[dim]

    def get_group(self, dim: int) -> int:
        """The group along a dimension: its number stands for it."""
        return dim


@dataclass(frozen=True)
class Held:
    """A DTensor without values."""

    shape: tuple[int, ...]
    device_mesh: Mesh
    placements: tuple[Any, ...]
    local: tuple[int, ...]

    def to_local(self) -> Tensor:
        """This rank's part, without values."""
        return torch.empty(self.local, device="meta")


def _chunk(shape: tuple[int, ...], dim: int, ways: int, index: int) -> tuple[int, ...]:
    """The shape of a rank's chunk."""
    chunks = torch.empty(shape, device="meta").chunk(ways, dim)
    return tuple(chunks[index].shape) if index < len(chunks) else (*shape[:dim], 0, *shape[dim + 1 :])


def place(shape: tuple[int, ...], axis: int | None, mesh: Mesh) -> Held:
    """A tensor on a (dp, tp) mesh: cut along ``axis`` over tp, then by FSDP2 along axis 0 over dp."""
    tp: Any = Replicate() if axis is None or mesh.shape[1] == 1 else Shard(axis)
    dp = _StridedShard(0, split_factor=mesh.shape[1]) if tp == Shard(0) else Shard(0)
    local = shape if isinstance(tp, Replicate) else _chunk(shape, tp.dim, mesh.shape[1], mesh.coordinate[1])
    local = _chunk(local, 0, mesh.shape[0], mesh.coordinate[0])
    return Held(shape, mesh, (dp, tp), local)


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...], layout: Layout, axis: int | None, mesh: Mesh) -> tuple[int, tuple[int, ...]]:
    """(shared blocks that a rank sends, mesh dimensions it sends them along)."""
    cut = placed_geometry(place(shape, axis, mesh), layout).cut
    return (0, ()) if cut is None else (cut.size, cut.groups)


def fsdp2(weights: Iterable[Weight], dp: int, tp: int = 1, coordinate: tuple[int, int] = (0, 0)) -> list[Message]:
    """Messages of a rank under FSDP2 over tensor parallelism; either may be 1.

    Args:
        weights: of the model.
        dp, tp: ranks along the mesh's two dimensions.
        coordinate: the rank's.

    Returns:
        One message per group that cuts blocks; rank (0, 0) holds the largest shards, and sends the most.
    """
    mesh, names = Mesh((dp, tp), coordinate), ("dp", "tp")
    found: dict[int, Message] = {}
    for (role, shape, layout, axis), times in Counter((w.role, w.shape, w.layout, w.axis) for w in weights).items():
        blocks, dims = _shared(shape, layout, axis, mesh)
        for dim in dims:
            found.setdefault(dim, Message(mesh.shape[dim], names[dim])).add(role, blocks, times)
    return [found[dim] for dim in sorted(found)]


def _cut_blocks(shape: tuple[int, ...], layout: Layout, bounds: Sequence[tuple[int, int]]) -> int:
    """Shared blocks of a flattened tensor; ranks that hold nothing of it may be left out of ``bounds``."""
    held = Range(shape, layout, tuple(bounds), 0)
    cut = flat_geometry([held], held.stop - held.start, None, torch.device("cpu")).cut
    return 0 if cut is None else cut.size


@lru_cache(maxsize=4096)
def _dealt(shape: tuple[int, ...], layout: Layout, ranks: int) -> int:
    """Shared blocks of a tensor that is flattened, padded and dealt out by itself."""
    numel = prod(shape)
    size = -(-numel // ranks)
    return _cut_blocks(shape, layout, [within(0, numel, r * size, (r + 1) * size) for r in range(ranks)])


def zero3(weights: Iterable[Weight], ranks: int, sub_group: int = SUB_GROUP) -> list[Message]:
    """Messages under DeepSpeed's stage 3: every parameter dealt out evenly, one step per sub-group."""
    out = []
    for group in _groups(weights):
        message, elements = Message(ranks, "dp"), 0
        for weight in group:
            if blocks := _dealt(weight.shape, weight.layout, ranks):
                message.blocks[weight.role] += blocks
            elements += -(-prod(weight.shape) // ranks)
            if elements >= sub_group or weight is group[-1]:
                message.tensors = int(message.blocks.total() > 0)  # all of it is one tensor
                out.append(message)
                message, elements = Message(ranks, "dp"), 0
    return [message for message in out if message.tensors]


def _joined(weights: Sequence[Weight], starts: Sequence[int], size: int, ranks: int, by_itself: bool) -> Message:
    """The message for tensors that lie at ``starts`` in one buffer, of which every rank has ``size`` elements."""
    message = Message(ranks, "dp")
    for weight, start in zip(weights, starts, strict=True):
        stop = start + prod(weight.shape)
        holders = range(start // size, -(-stop // size))
        blocks = _cut_blocks(
            weight.shape, weight.layout, [within(start, stop, r * size, (r + 1) * size) for r in holders]
        )
        if blocks and by_itself:
            message.add(weight.role, blocks)
        elif blocks:
            message.blocks[weight.role] += blocks
            message.tensors = 1
    return message


def zero12(weights: Iterable[Weight], ranks: int) -> list[Message]:
    """Messages under DeepSpeed's stages 1 and 2: each parameter group is one buffer in equal parts, and one step."""
    out = []
    for group in _groups(weights):
        starts, at = _ends(group)
        padded = -(-at // (_ALIGNMENT * ranks)) * _ALIGNMENT * ranks
        out.append(_joined(group, starts, padded // ranks, ranks, by_itself=False))
    return [message for message in out if message.tensors]


def fsdp1(units: Iterable[Sequence[Weight]], ranks: int, original: bool, itemsize: int = 4) -> list[Message]:
    """The message under FSDP1, if there is one; every unit (wrapped module) is one buffer in equal parts.

    Args:
        units: weights by wrapped module.
        ranks: of the group.
        original: ``use_orig_params``: weights are aligned, and tensors by themselves.
        itemsize: bytes of an element.
    """
    total = Message(ranks, "dp")
    for unit in units:
        starts, at = _ends(unit, _FSDP1_BYTES // itemsize if original else 1)
        message = _joined(unit, starts, -(-at // ranks), ranks, by_itself=original)
        total.blocks += message.blocks
        total.tensors += message.tensors
    return [total] if total.tensors else []


def _ends(weights: Sequence[Weight], align: int = 1) -> tuple[list[int], int]:
    """(where each begins, where the last one ends) in a buffer."""
    starts, at = [], 0
    for weight in weights:
        starts.append(-(-at // align) * align)
        at = starts[-1] + prod(weight.shape)
    return starts, at


def _groups(weights: Iterable[Weight]) -> list[list[Weight]]:
    """The parameter groups of an optimizer that was built from a model."""
    weights = list(weights)
    return [group for group in ([w for w in weights if w.decays == decays] for decays in (True, False)) if group]
