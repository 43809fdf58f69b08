"""Simulate the messages that one rank's optimizer sends in a step.

Which blocks a shard cuts is computed by ``optimizer.sharding``, as in a real step. It needs only the shape of a device
mesh, not its processes, so ``Mesh`` and ``FakeDTensor`` replace torch's classes, and one process can simulate any rank
of thousands. How torch and DeepSpeed shard a tensor (``torch.chunk``, padding, sub-groups) is implemented here. Equal
tensors, such as those of equal layers, are simulated once.
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
"""DeepSpeed's default ``sub_group_size``: the number of local elements that ZeRO-3 updates at a time."""
_ALIGNMENT = 2
"""ZeRO 1 and 2 pad a flattened group to a multiple of this number of elements per rank."""
_FSDP1_BYTES = 16
"""Alignment of original parameters in FSDP1, in bytes."""


@dataclass
class Message:
    """One all-reduce of one rank.

    Attributes:
        ranks: number of ranks in the group.
        along: mesh dimension of the group.
        blocks: number of shared blocks whose sums are sent, by the role of their tensor.
        tensors: number of tensors with shared blocks; the message has one additional number for each.
    """

    ranks: int
    along: str
    blocks: Counter[str] = field(default_factory=Counter)
    tensors: int = 0

    @property
    def numbers(self) -> int:
        """Number of fp32 values in the message."""
        return self.blocks.total() + self.tensors

    def add(self, role: str, blocks: int, times: int = 1) -> None:
        """Add ``times`` equal tensors, each with this number of shared blocks."""
        self.blocks[role] += blocks * times
        self.tensors += times


@dataclass(frozen=True)
class Mesh:
    """A device mesh without processes, from the view of one rank."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    device_type: str = "cpu"

    @property
    def mesh(self) -> Tensor:
        """All ranks, in the shape of the mesh."""
        return torch.arange(prod(self.shape)).view(self.shape)

    def get_coordinate(self) -> list[int]:
        """Return this rank's coordinate."""
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        """Return the number of ranks along a dimension."""
        return self.shape[dim]

    def get_group(self, dim: int) -> int:
        """Return the dimension itself, which identifies the process group along it."""
        return dim


@dataclass(frozen=True)
class FakeDTensor:
    """A DTensor without values."""

    shape: tuple[int, ...]
    device_mesh: Mesh
    placements: tuple[Any, ...]
    local: tuple[int, ...]

    def to_local(self) -> Tensor:
        """Return this rank's shard, without values."""
        return torch.empty(self.local, device="meta")


def _chunk(shape: tuple[int, ...], dim: int, ways: int, index: int) -> tuple[int, ...]:
    """Return the shape of a rank's chunk by ``torch.chunk``, with length 0 if there are fewer chunks than ranks."""
    chunks = torch.empty(shape, device="meta").chunk(ways, dim)
    return tuple(chunks[index].shape) if index < len(chunks) else (*shape[:dim], 0, *shape[dim + 1 :])


def place(shape: tuple[int, ...], axis: int | None, mesh: Mesh) -> FakeDTensor:
    """Shard a tensor on a (dp, tp) mesh: along ``axis`` over tp, then by FSDP2 along axis 0 over dp."""
    tp: Any = Replicate() if axis is None or mesh.shape[1] == 1 else Shard(axis)
    dp = _StridedShard(0, split_factor=mesh.shape[1]) if tp == Shard(0) else Shard(0)
    local = shape if isinstance(tp, Replicate) else _chunk(shape, tp.dim, mesh.shape[1], mesh.coordinate[1])
    local = _chunk(local, 0, mesh.shape[0], mesh.coordinate[0])
    return FakeDTensor(shape, mesh, (dp, tp), local)


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...], layout: Layout, axis: int | None, mesh: Mesh) -> tuple[int, tuple[int, ...]]:
    """Return (number of shared blocks that a rank sends, mesh dimensions along which it sends them)."""
    cut = placed_geometry(place(shape, axis, mesh), layout).cut
    return (0, ()) if cut is None else (cut.size, cut.groups)


def fsdp2(weights: Iterable[Weight], dp: int, tp: int = 1, coordinate: tuple[int, int] = (0, 0)) -> list[Message]:
    """Return the messages of a rank under FSDP2 combined with tensor parallelism.

    Args:
        weights: the model's weights.
        dp: number of ranks along the data-parallel dimension.
        tp: number of ranks along the tensor-parallel dimension; 1 for FSDP2 alone.
        coordinate: the rank's coordinate (dp, tp).

    Returns:
        One message for each group that cuts blocks. Rank (0, 0) has the largest shards and sends the most.
    """
    mesh, names = Mesh((dp, tp), coordinate), ("dp", "tp")
    messages: dict[int, Message] = {}
    for (role, shape, layout, axis), times in Counter((w.role, w.shape, w.layout, w.axis) for w in weights).items():
        blocks, dims = _shared(shape, layout, axis, mesh)
        for dim in dims:
            messages.setdefault(dim, Message(mesh.shape[dim], names[dim])).add(role, blocks, times)
    return [messages[dim] for dim in sorted(messages)]


def _cut_blocks(shape: tuple[int, ...], layout: Layout, bounds: Sequence[tuple[int, int]]) -> int:
    """Return the number of shared blocks of a flattened tensor.

    Args:
        shape: shape of the tensor.
        layout: layout of the tensor.
        bounds: (start, stop) of each rank's elements; ranks without elements may be left out.
    """
    local_range = Range(shape, layout, tuple(bounds), 0)
    cut = flat_geometry([local_range], local_range.stop - local_range.start, None, torch.device("cpu")).cut
    return 0 if cut is None else cut.size


@lru_cache(maxsize=4096)
def _dealt(shape: tuple[int, ...], layout: Layout, ranks: int) -> int:
    """Return the number of shared blocks of a tensor that is flattened, padded and split evenly over the ranks."""
    numel = prod(shape)
    size = -(-numel // ranks)
    return _cut_blocks(shape, layout, [within(0, numel, r * size, (r + 1) * size) for r in range(ranks)])


def zero3(weights: Iterable[Weight], ranks: int, sub_group: int = SUB_GROUP) -> list[Message]:
    """Return the messages under ZeRO-3, which splits every parameter evenly and updates one sub-group at a time."""
    out = []
    for group in _groups(weights):
        message, elements = Message(ranks, "dp"), 0
        for weight in group:
            if blocks := _dealt(weight.shape, weight.layout, ranks):
                message.blocks[weight.role] += blocks
            elements += -(-prod(weight.shape) // ranks)
            if elements >= sub_group or weight is group[-1]:
                message.tensors = int(message.blocks.total() > 0)  # The optimizer sees the sub-group as one tensor.
                out.append(message)
                message, elements = Message(ranks, "dp"), 0
    return [message for message in out if message.tensors]


def _buffer_message(weights: Sequence[Weight], starts: Sequence[int], size: int, ranks: int, separate: bool) -> Message:
    """Return the message for weights that are stored in one buffer.

    Args:
        weights: the weights in the buffer.
        starts: index of each weight's first element in the buffer.
        size: number of elements of each rank.
        ranks: number of ranks.
        separate: whether the optimizer sees the weights as separate tensors and not the buffer as one tensor.
    """
    message = Message(ranks, "dp")
    for weight, start in zip(weights, starts, strict=True):
        stop = start + prod(weight.shape)
        holders = range(start // size, -(-stop // size))
        blocks = _cut_blocks(
            weight.shape, weight.layout, [within(start, stop, r * size, (r + 1) * size) for r in holders]
        )
        if blocks and separate:
            message.add(weight.role, blocks)
        elif blocks:
            message.blocks[weight.role] += blocks
            message.tensors = 1
    return message


def zero12(weights: Iterable[Weight], ranks: int) -> list[Message]:
    """Return the messages under ZeRO-1 and ZeRO-2, which split the buffer of each parameter group into equal parts."""
    out = []
    for group in _groups(weights):
        starts, end = _positions(group)
        padded = -(-end // (_ALIGNMENT * ranks)) * _ALIGNMENT * ranks
        out.append(_buffer_message(group, starts, padded // ranks, ranks, separate=False))
    return [message for message in out if message.tensors]


def fsdp1(units: Iterable[Sequence[Weight]], ranks: int, original: bool, itemsize: int = 4) -> list[Message]:
    """Return the message under FSDP1, or no message; each unit is one buffer that is split into equal parts.

    Args:
        units: the weights of each unit, which is a module that FSDP1 wraps.
        ranks: number of ranks in the group.
        original: ``use_orig_params``; if it is set, the optimizer sees separate tensors, aligned in the buffer.
        itemsize: bytes of an element.
    """
    total = Message(ranks, "dp")
    for unit in units:
        starts, end = _positions(unit, _FSDP1_BYTES // itemsize if original else 1)
        message = _buffer_message(unit, starts, -(-end // ranks), ranks, separate=original)
        total.blocks += message.blocks
        total.tensors += message.tensors
    return [total] if total.tensors else []


def _positions(weights: Sequence[Weight], align: int = 1) -> tuple[list[int], int]:
    """Return (start of each weight, end of the last weight) in a buffer."""
    starts, end = [], 0
    for weight in weights:
        starts.append(-(-end // align) * align)
        end = starts[-1] + prod(weight.shape)
    return starts, end


def _groups(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Return the weights by parameter group, for an optimizer that was built from a model."""
    weights = list(weights)
    return [group for group in ([w for w in weights if w.decays == decays] for decays in (True, False)) if group]
