"""Compute what one rank's optimizer sends in a step, with the geometries that the optimizer itself uses.

``optimizer.sharding.offline`` shards tensors as torch and DeepSpeed do, without starting processes. The geometries of
``optimizer.sharding`` then determine which blocks are cut. Results are computed once for equal tensors, such as those
of a model's layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch

from benchmarks.scaling.weights import Weight
from optimizer.partition import FactoredLayout, TensorLayout
from optimizer.sharding.flat import Range, flat_geometry
from optimizer.sharding.geometry import Geometry
from optimizer.sharding.offline import ALIGNMENT, SUB_GROUP, Buffer, Mesh, joined, part, place, sub_groups
from optimizer.sharding.placed import placed_geometry
from optimizer.sharding.placed_columns import placed_factored_geometry

_FSDP1_BYTES = 16
"""Number of bytes to which FSDP1 aligns original parameters."""


@dataclass
class Message:
    """One all-reduce of one rank.

    Attributes:
        ranks: number of ranks in its process group.
        along: mesh dimension of the process group, "dp" or "tp".
        blocks: role -> number of blocks of tensors of this role whose sums are sent, because ranks share them.
        tensors: number of tensors with shared blocks. One additional number is sent for each.
    """

    ranks: int
    along: str
    blocks: Counter[str] = field(default_factory=Counter)
    tensors: int = 0

    @property
    def numbers(self) -> int:
        """Number of numbers that are sent."""
        return self.blocks.total() + self.tensors

    def add(self, role: str, blocks: int, times: int = 1) -> None:
        """Add ``times`` equal tensors of a role, each with this number of shared blocks."""
        self.blocks[role] += blocks * times
        self.tensors += times


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...], layout: TensorLayout, axis: int | None, mesh: Mesh) -> dict[int, int]:
    """Return how many sums of shared blocks, rows and columns a rank sends along each mesh dimension."""
    placed = place(shape, axis, mesh)
    if isinstance(layout, FactoredLayout):
        return _by_group(placed_factored_geometry(placed, layout))
    return _by_group(placed_geometry(placed, layout))


def _by_group(geometry: Geometry) -> dict[int, int]:
    """Return how many sums a rank sends over each process group, which is a mesh dimension's number here."""
    numbers: Counter[int] = Counter()
    for size, groups in geometry.sent:
        for group in groups:
            numbers[group] += size
    return dict(numbers)


def fsdp2(weights: Iterable[Weight], dp: int, tp: int = 1, coordinate: tuple[int, int] = (0, 0)) -> list[Message]:
    """Return the messages of a rank under FSDP2 combined with tensor parallelism.

    Args:
        weights: weights of the model.
        dp: number of data-parallel ranks, which may be 1.
        tp: number of tensor-parallel ranks, which may be 1.
        coordinate: index of the rank along both dimensions of the mesh. Rank (0, 0) has the largest shards and sends
            the most.

    Returns:
        One message per mesh dimension along which blocks are cut.
    """
    mesh, names = Mesh((dp, tp), coordinate), ("dp", "tp")
    messages: dict[int, Message] = {}
    for (role, shape, layout, axis), times in Counter((w.role, w.shape, w.layout, w.axis) for w in weights).items():
        for dim, blocks in _shared(shape, layout, axis, mesh).items():
            messages.setdefault(dim, Message(mesh.shape[dim], names[dim])).add(role, blocks, times)
    return [messages[dim] for dim in sorted(messages)]


def _cut_blocks(shape: tuple[int, ...], layout: TensorLayout, bounds: Sequence[tuple[int, int]]) -> int:
    """Return the number of shared blocks of a flattened tensor. ``bounds`` may omit ranks without elements."""
    first = Range(shape, layout, tuple(bounds), 0)
    geometry = flat_geometry([first], first.stop - first.start, None, torch.device("cpu"))
    return sum(size for size, _ in geometry.sent)


@lru_cache(maxsize=4096)
def _cut_blocks_zero3(shape: tuple[int, ...], layout: TensorLayout, ranks: int) -> int:
    """Return the number of shared blocks of a tensor that is flattened, padded and divided equally among ranks."""
    return _cut_blocks(shape, layout, [part(prod(shape), ranks, rank) for rank in range(ranks)])


def zero3(weights: Iterable[Weight], ranks: int, sub_group: int = SUB_GROUP) -> list[Message]:
    """Return the messages under DeepSpeed's stage 3: parameters are sharded separately, each sub-group is one step."""
    out = []
    for group in _groups(weights):
        for indices in sub_groups([prod(weight.shape) for weight in group], ranks, sub_group):
            message = Message(ranks, "dp")
            for weight in group[indices.start : indices.stop]:
                if blocks := _cut_blocks_zero3(weight.shape, weight.layout, ranks):
                    message.blocks[weight.role] += blocks
            message.tensors = int(message.blocks.total() > 0)  # DeepSpeed joins a sub-group to one tensor.
            out.append(message)
    return [message for message in out if message.tensors]


def _joined(weights: Sequence[Weight], buffer: Buffer, ranks: int, separate: bool) -> Message:
    """Return the message for tensors that are joined to one buffer.

    Args:
        weights: the tensors.
        buffer: their positions in the buffer.
        ranks: number of ranks that share the buffer.
        separate: whether the optimizer steps the tensors separately; otherwise it steps the buffer as one tensor.
    """
    message = Message(ranks, "dp")
    for i, weight in enumerate(weights):
        bounds = buffer.parts(i, prod(weight.shape)).values()
        blocks = _cut_blocks(weight.shape, weight.layout, list(bounds)) if bounds else 0
        if blocks and separate:
            message.add(weight.role, blocks)
        elif blocks:
            message.blocks[weight.role] += blocks
            message.tensors = 1
    return message


def zero12(weights: Iterable[Weight], ranks: int) -> list[Message]:
    """Return the messages under DeepSpeed's stages 1 and 2: a parameter group is one buffer and one step."""
    out = []
    for group in _groups(weights):
        buffer = joined([prod(weight.shape) for weight in group], ranks, multiple=ALIGNMENT)
        out.append(_joined(group, buffer, ranks, separate=False))
    return [message for message in out if message.tensors]


def fsdp1(units: Iterable[Sequence[Weight]], ranks: int, original: bool, itemsize: int = 4) -> list[Message]:
    """Return the message under FSDP1, in which every unit (wrapped module) is one buffer that is divided equally.

    Args:
        units: weights of each wrapped module.
        ranks: number of ranks of the process group.
        original: value of FSDP1's ``use_orig_params``: whether weights are aligned and stepped separately.
        itemsize: bytes of an element.

    Returns:
        One message, or none if no block is shared.
    """
    total = Message(ranks, "dp")
    for unit in units:
        align = _FSDP1_BYTES // itemsize if original else 1
        buffer = joined([prod(weight.shape) for weight in unit], ranks, align=align)
        message = _joined(unit, buffer, ranks, separate=original)
        total.blocks += message.blocks
        total.tensors += message.tensors
    return [total] if total.tensors else []


def _groups(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Return the weights with weight decay and those without, leaving out empty groups."""
    weights = list(weights)
    return [group for group in ([w for w in weights if w.decays == decays] for decays in (True, False)) if group]
