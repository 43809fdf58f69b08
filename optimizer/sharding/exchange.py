"""Mean squares of blocks that ranks share, with one all-reduce per process group and step for all tensors together."""

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
    """Return the global ranks of a group. They identify it: groups of the same ranks count as one."""
    return tuple(dist.get_process_group_ranks(group))


def destroyed(what: str) -> RuntimeError:
    """Return the error for a process group that no longer exists; ``what`` names the group."""
    return RuntimeError(
        f"{what} was destroyed; nothing has been stepped. Shard the model and build the optimizer anew, over groups "
        "that exist"
    )


def _require_alive(ranks: tuple[int, ...], group: ProcessGroup) -> None:
    """Raise RuntimeError if a group has been destroyed.

    Without this check gloo would continue to send, and NCCL would fail with a message that does not name the cause.
    """
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError) as error:
        raise destroyed(f"the process group of ranks {_words(ranks)}, which share blocks of parameters,") from error


def _words(ranks: tuple[int, ...]) -> str:
    """Return ranks as text, abbreviated if there are many."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 16 else f"{ranks[0]} to {ranks[-1]} ({len(ranks)})"


def groups_in_order(geometries: Sequence[Geometry]) -> dict[tuple[int, ...], ProcessGroup]:
    """Return the process groups over which blocks are cut, by their ranks, in the order of their first appearance.

    Every rank of a group has the same tensors in the same order. Two ranks that share two groups therefore use them in
    the same order, and no deadlock can occur.
    """
    groups: dict[tuple[int, ...], ProcessGroup] = {}
    for geometry in geometries:
        for group in geometry.cut.groups if geometry.cut is not None else ():
            groups.setdefault(ranks_of(group), group)
    return groups


def block_means(works: Sequence[tuple[Geometry, Tensor | None, torch.dtype]]) -> list[Tensor | None]:
    """Return the mean squared gradient of every block of every tensor, over the elements of all ranks.

    A rank without a gradient sends zeros. Which ranks send therefore follows from layouts and placements alone, which
    are the same on all ranks, so no rank waits for a message that never comes. Each tensor's message also counts the
    gradients: if any rank that shares blocks of a tensor has a gradient, all of them step the tensor, as one process
    would.

    Args:
        works: for each tensor: (geometry with a cut, local gradient or None, accumulation dtype). Every rank of a
            group must pass the same tensors in the same order.

    Returns:
        For each tensor, the means as [number of local blocks], or None if no rank has a gradient.

    Raises:
        RuntimeError: a process group was destroyed; or, with torch's own message, a rank failed or timed out.
    """
    groups = groups_in_order([geometry for geometry, _, _ in works])
    for key, group in groups.items():
        _require_alive(key, group)
    shared: list[Tensor] = []
    local: list[Tensor] = []
    for geometry, grad, dtype in works:
        assert geometry.cut is not None
        means = _local_share(geometry, grad, dtype)
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
    """Return block means in the shape of local second moments, for tensors with and without shared blocks.

    Args:
        works: for each tensor: (geometry, local gradient or None, dtype). Every rank of a group must pass the same
            tensors in the same order.

    Returns:
        For each tensor, the mean squared gradient of its blocks, shape ``geometry.aligned``; zeros if there is no
        gradient.
    """
    cut = [i for i, (geometry, _, _) in enumerate(works) if geometry.cut is not None]
    means = dict(zip(cut, block_means([works[i] for i in cut]), strict=True))
    out = []
    for i, (geometry, grad, dtype) in enumerate(works):
        second = means.get(i)
        if second is not None and geometry.cut is not None:
            spread = geometry.cut.blocks.spread
            second = (second if spread is None else second[spread.to(second.device)]).reshape(geometry.aligned)
            for box in geometry.free if grad is not None else ():
                view = box.of(grad)  # type: ignore[arg-type]
                aligned = box.of_second(second, tuple(view.shape))
                aligned.copy_(block_mean_square(view, box.layout))
        elif grad is not None and geometry.boxes:
            box = geometry.boxes[0]
            second = block_mean_square(box.of(grad), box.layout)
        else:
            second = torch.zeros(geometry.aligned, dtype=dtype)
        out.append(second.reshape(geometry.aligned))
    return out


def _all_reduce(shared: list[Tensor], members: list[int], group: ProcessGroup) -> None:
    """Sum the vectors at the indices ``members`` over a group, in place and in one message."""
    dtype = max((shared[i].dtype for i in members), key=lambda dtype: dtype.itemsize)
    message = torch.cat([shared[i].to(dtype) for i in members])
    dist.all_reduce(message, group=group)
    for i, summed in zip(members, message.split([len(shared[i]) for i in members]), strict=True):
        shared[i] = summed.to(shared[i].dtype)


def _local_share(geometry: Geometry, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return this rank's share of the mean square of each local block, [number of local blocks].

    The share is the sum of squares over the rank's elements, divided by the number of elements on all ranks.
    """
    assert geometry.cut is not None
    blocks = geometry.cut.blocks
    sums = torch.zeros(len(blocks.counts), dtype=dtype, device=geometry.cut.device if grad is None else grad.device)
    if grad is None:
        return sums
    for box in geometry.boxes:
        if box.free:
            continue  # the engine that steps the box computes its means
        view = box.of(grad)
        layout = box.layout
        (view,), layout = layout.unfold(view), layout.unfolded()
        shape = layout.aligned_shape(view.shape)
        reduced = [d for d, (aligned, full) in enumerate(zip(shape, view.shape, strict=True)) if aligned != full]
        norm = torch.linalg.vector_norm(view, 2, dim=reduced, keepdim=True, dtype=dtype) if reduced else view.to(dtype)
        squares = norm.square().flatten()
        slots = blocks.spread if box.slots is None else box.slots
        if slots is None:
            sums += squares
        else:
            sums.index_add_(0, slots.to(sums.device), squares)
    divided = None if geometry.cut.values is None else blocks.at(geometry.cut.values)
    if divided is None:
        return sums.div_(blocks.counts.to(sums.device, dtype))
    divided, counts = divided.to(sums.device), blocks.counts[divided]
    # A block may occur several times in the index; each occurrence writes the same quotient.
    sums[divided] /= counts.to(sums.device, dtype)
    return sums
