"""Mean squares of blocks that ranks share: one all-reduce per process group and step, for all tensors together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..step.update import block_mean_square
from .geometry import Geometry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@lru_cache(maxsize=1024)
def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """Global ranks of a group; groups of the same ranks count as one."""
    return tuple(dist.get_process_group_ranks(group))


def destroyed(what: str) -> RuntimeError:
    """The error for a process group that is gone."""
    return RuntimeError(
        f"{what} was destroyed; nothing has been stepped. Shard the model and build the optimizer anew, over groups "
        "that exist"
    )


def _require_alive(ranks: tuple[int, ...], group: ProcessGroup) -> None:
    """Raise RuntimeError where a group has been destroyed: gloo would go on sending, NCCL fail in its own words."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError) as error:
        raise destroyed(f"the process group of ranks {_words(ranks)}, which share blocks of parameters,") from error


def _words(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 16 else f"{ranks[0]} to {ranks[-1]} ({len(ranks)})"


def groups_in_order(geometries: Sequence[Geometry]) -> dict[tuple[int, ...], ProcessGroup]:
    """The groups that cut blocks, in the order of their first appearance.

    Every rank of a group holds the same tensors in the same order, so that any two ranks which share two groups
    meet them in the same order: nobody waits in a circle.
    """
    found: dict[tuple[int, ...], ProcessGroup] = {}
    for geometry in geometries:
        for group in geometry.cut.groups if geometry.cut is not None else ():
            found.setdefault(ranks_of(group), group)
    return found


def block_means(works: Sequence[tuple[Geometry, Tensor | None, torch.dtype]]) -> list[Tensor | None]:
    """Mean of the squared gradient over every block of every tensor, whichever ranks hold its elements.

    A rank without a gradient takes part with zeros: who takes part follows from layouts and placements alone, which
    are the same on all ranks, so nobody is waited for in vain. A count of gradients travels with the sums: where any
    rank that shares blocks of a tensor has one, the tensor steps on all of them, as it would in one process.

    Args:
        works: (geometry with a cut, local gradient, accumulation dtype); the same tensors in the same order on every
            rank of a group.

    Returns:
        For each, [number of local blocks], or None where no rank has a gradient.

    Raises:
        RuntimeError: a process group was destroyed, or (torch's words) a rank is gone or came too late.
    """
    groups = groups_in_order([geometry for geometry, _, _ in works])
    for key, group in groups.items():
        _require_alive(key, group)
    shared: list[Tensor] = []
    local: list[Tensor] = []
    for geometry, grad, dtype in works:
        assert geometry.cut is not None
        means = _own_share(geometry, grad, dtype)
        send = torch.zeros(geometry.cut.size + 1, dtype=dtype, device=geometry.cut.device)
        send[geometry.cut.positions] = means[geometry.cut.slots].to(send.device)
        send[-1] = grad is not None
        local.append(means)
        shared.append(send)
    for key, group in groups.items():
        members = [i for i, (geometry, _, _) in enumerate(works) if key in {ranks_of(g) for g in geometry.cut.groups}]  # type: ignore[union-attr]
        _all_reduce(shared, members, group)
    out: list[Tensor | None] = []
    for (geometry, _, _), means, summed in zip(works, local, shared, strict=True):
        assert geometry.cut is not None
        means[geometry.cut.slots] = summed[geometry.cut.positions].to(means.device)
        out.append(means if summed[-1] > 0 else None)
    return out


def second_moments(works: Sequence[tuple[Geometry, Tensor | None, torch.dtype]]) -> list[Tensor]:
    """What ``block_means`` finds, for geometries with shared blocks and others, as local second moments."""
    cut = [i for i, (geometry, _, _) in enumerate(works) if geometry.cut is not None]
    means = dict(zip(cut, block_means([works[i] for i in cut]), strict=True))
    out = []
    for i, (geometry, grad, dtype) in enumerate(works):
        found = means.get(i)
        if found is not None and geometry.cut is not None:
            spread = geometry.cut.blocks.spread
            found = (found if spread is None else found[spread.to(found.device)]).reshape(geometry.aligned)
            for part in geometry.free if grad is not None else ():
                box = part.of(grad)  # type: ignore[arg-type]
                own = part.of_second(found, tuple(box.shape))
                own.copy_(block_mean_square(box, part.layout))
        elif grad is not None and geometry.boxes:
            part = geometry.boxes[0]
            found = block_mean_square(part.of(grad), part.layout)
        else:
            found = torch.zeros(geometry.aligned, dtype=dtype)
        out.append(found.reshape(geometry.aligned))
    return out


def _all_reduce(shared: list[Tensor], members: list[int], group: ProcessGroup) -> None:
    """Sum the members' vectors over a group, in one message."""
    dtype = max((shared[i].dtype for i in members), key=lambda dtype: dtype.itemsize)
    message = torch.cat([shared[i].to(dtype) for i in members])
    dist.all_reduce(message, group=group)
    for i, summed in zip(members, message.split([len(shared[i]) for i in members]), strict=True):
        shared[i] = summed.to(shared[i].dtype)


def _own_share(geometry: Geometry, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """This rank's share of each local block's mean square, [number of local blocks]."""
    assert geometry.cut is not None
    blocks = geometry.cut.blocks
    sums = torch.zeros(len(blocks.counts), dtype=dtype, device=geometry.cut.device if grad is None else grad.device)
    if grad is None:
        return sums
    for part in geometry.boxes:
        if part.free:
            continue  # the engine that takes it finds its means
        box = part.of(grad)
        layout = part.layout
        (box,), layout = layout.unfold(box), layout.unfolded()
        shape = layout.aligned_shape(box.shape)
        reduced = [d for d, (kept, full) in enumerate(zip(shape, box.shape, strict=True)) if kept != full]
        norm = torch.linalg.vector_norm(box, 2, dim=reduced, keepdim=True, dtype=dtype) if reduced else box.to(dtype)
        squares = norm.square().flatten()
        to = blocks.spread if part.slots is None else part.slots
        if to is None:
            sums += squares
        else:
            sums.index_add_(0, to.to(sums.device), squares)
    own = None if geometry.cut.values is None else blocks.at(geometry.cut.values)
    if own is None:
        return sums.div_(blocks.counts.to(sums.device, dtype))
    own, counts = own.to(sums.device), blocks.counts[own]
    sums[own] /= counts.to(sums.device, dtype)  # one block may stand there several times: its quotient is the same
    return sums
