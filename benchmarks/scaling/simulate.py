"""What one rank's optimizer sends in a step, from the library's own geometries of real layouts.

``optimizer.sharding.offline`` cuts tensors as torch and DeepSpeed do, without processes. The geometries of
``optimizer.sharding`` say which blocks that cuts. Equal tensors (layers of a model) are asked once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch

from benchmarks.scaling.weights import Weight
from optimizer.partition import Layout
from optimizer.sharding.flat import Range, flat_geometry
from optimizer.sharding.offline import ALIGNMENT, SUB_GROUP, Buffer, Mesh, joined, part, place, sub_groups
from optimizer.sharding.placed import placed_geometry

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
    return _cut_blocks(shape, layout, [part(prod(shape), ranks, rank) for rank in range(ranks)])


def zero3(weights: Iterable[Weight], ranks: int, sub_group: int = SUB_GROUP) -> list[Message]:
    """Messages under DeepSpeed's stage 3: every parameter dealt out evenly, one step per sub-group."""
    out = []
    for group in _groups(weights):
        for indices in sub_groups([prod(weight.shape) for weight in group], ranks, sub_group):
            message = Message(ranks, "dp")
            for weight in group[indices.start : indices.stop]:
                if blocks := _dealt(weight.shape, weight.layout, ranks):
                    message.blocks[weight.role] += blocks
            message.tensors = int(message.blocks.total() > 0)  # all of it is one tensor
            out.append(message)
    return [message for message in out if message.tensors]


def _joined(weights: Sequence[Weight], buffer: Buffer, ranks: int, by_itself: bool) -> Message:
    """The message for tensors that lie in one buffer."""
    message = Message(ranks, "dp")
    for i, weight in enumerate(weights):
        bounds = buffer.parts(i, prod(weight.shape)).values()
        blocks = _cut_blocks(weight.shape, weight.layout, list(bounds)) if bounds else 0
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
        buffer = joined([prod(weight.shape) for weight in group], ranks, multiple=ALIGNMENT)
        out.append(_joined(group, buffer, ranks, by_itself=False))
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
        align = _FSDP1_BYTES // itemsize if original else 1
        buffer = joined([prod(weight.shape) for weight in unit], ranks, align=align)
        message = _joined(unit, buffer, ranks, by_itself=original)
        total.blocks += message.blocks
        total.tensors += message.tensors
    return [total] if total.tensors else []


def _groups(weights: Iterable[Weight]) -> list[list[Weight]]:
    """The parameter groups of an optimizer that was built from a model."""
    weights = list(weights)
    return [group for group in ([w for w in weights if w.decays == decays] for decays in (True, False)) if group]
