"""Mean squares of blocks that ranks share, with one all-reduce per process group and step for all tensors together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..partition.factored import FactoredLayout
from ..partition.layout import Layout
from ..step.factored import factored_means
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


class Work(NamedTuple):
    """One sharded tensor of a step.

    Attributes:
        geometry: the shard, with a cut.
        grad: local gradient; None if this rank has none.
        dtype: dtype of the sums.
        columns: local column means before the step, if the second moment is factored; None counts as zeros.
    """

    geometry: Geometry
    grad: Tensor | None
    dtype: torch.dtype
    columns: Tensor | None = None


class Means(NamedTuple):
    """The mean squared gradients of one tensor, over the elements of all ranks.

    Attributes:
        blocks: of each local block, or of each local row of a factored tensor.
        columns: of each local column, flattened; None if the tensor is not factored.
        all_columns: of all columns of each part, see ``Columns.mean``; None if this rank has all columns.
        before: the mean of all column means before the step; None if this rank has all columns.
    """

    blocks: Tensor
    columns: Tensor | None = None
    all_columns: Tensor | None = None
    before: Tensor | None = None


def groups_in_order(geometries: Sequence[Geometry]) -> dict[tuple[int, ...], ProcessGroup]:
    """Return the process groups over which blocks are cut, by their ranks, in the order of their first appearance.

    Every rank of a group has the same tensors in the same order. Two ranks that share two groups therefore use them in
    the same order, and no deadlock can occur.
    """
    groups: dict[tuple[int, ...], ProcessGroup] = {}
    for geometry in geometries:
        of_columns = geometry.columns.all_groups if geometry.columns is not None else ()
        for group in (*(geometry.cut.groups if geometry.cut is not None else ()), *of_columns):
            groups.setdefault(ranks_of(group), group)
    return groups


def block_means(works: Sequence[Work]) -> list[Means | None]:
    """Return the mean squared gradient of every block of every tensor, over the elements of all ranks.

    A rank without a gradient sends zeros. Which ranks send therefore follows from layouts and placements alone, which
    are the same on all ranks, so no rank waits for a message that never comes. Each tensor's message also counts the
    gradients: if any rank that shares blocks of a tensor has a gradient, all of them step the tensor, as one process
    would.

    Args:
        works: the tensors. Every rank of a group must pass the same tensors in the same order.

    Returns:
        The means of each tensor, or None if no rank has a gradient.

    Raises:
        RuntimeError: a process group was destroyed; or, with torch's own message, a rank failed or timed out.
    """
    groups = groups_in_order([work.geometry for work in works])
    for key, group in groups.items():
        _require_alive(key, group)
    local = [_local_share(*work[:3]) for work in works]
    columns = [
        work.geometry.columns.shares(work.geometry.boxes, work.grad, means) if work.geometry.columns else None
        for work, means in zip(works, local, strict=True)
    ]
    # The last message of each tensor is the count of gradients.
    messages = [_messages(*tensor) for tensor in zip(works, local, columns, strict=True)]
    vectors = [message.vector for of_tensor in messages for message in of_tensor]
    senders = [{ranks_of(g) for g in message.groups} for of_tensor in messages for message in of_tensor]
    for key, group in groups.items():
        members = [i for i, sender in enumerate(senders) if key in sender]
        if members:
            _all_reduce(vectors, members, group)
    out: list[Means | None] = []
    summed = iter(vectors)
    for work, means, shares, of_tensor in zip(works, local, columns, messages, strict=True):
        received = [next(summed) for _ in of_tensor]
        out.append(_received(work.geometry, means, shares, received) if received[-1][-1] > 0 else None)
    return out


class _Message(NamedTuple):
    """Numbers of one tensor, and the process groups to sum them over."""

    vector: Tensor
    groups: tuple[ProcessGroup, ...]


def _messages(work: Work, means: Tensor, shares: Tensor | None) -> list[_Message]:
    """Return what a rank sends for one tensor; the last number of the last message counts the gradients.

    Args:
        work: the tensor.
        means: this rank's share of the mean square of each local block.
        shares: this rank's share of the mean square of each local column; None if the tensor is not factored.
    """
    cut, columns = work.geometry.cut, work.geometry.columns
    assert cut is not None

    def message(size: int, positions: Tensor, values: Tensor, last: float | None = None) -> Tensor:
        vector = torch.zeros(size + (last is not None), dtype=work.dtype, device=cut.device)
        vector[positions.to(vector.device)] = values.to(vector.device)
        if last is not None:
            vector[-1] = last
        return vector

    has_gradient = float(work.grad is not None)
    blocks = means[cut.slots.to(means.device)]
    if columns is None or shares is None:
        return [_Message(message(cut.size, cut.positions, blocks, has_gradient), cut.groups)]
    out = [_Message(message(cut.size, cut.positions, blocks), cut.groups)]
    out.append(
        _Message(message(columns.size, columns.positions, shares[columns.slots.to(shares.device)]), columns.groups)
    )
    total = 0
    if columns.row_groups:
        old = torch.zeros_like(shares) if work.columns is None else work.columns.reshape(-1)
        total = columns.mean_size
        out.append(_Message(message(total, columns.mean_positions, columns.mean(old)), columns.row_groups))
    positions = columns.mean_positions if total else cut.positions[:0]
    values = columns.mean(shares) if total else shares[:0]
    out.append(_Message(message(total, positions, values, has_gradient), (*cut.groups, *columns.all_groups)))
    return out


def _received(geometry: Geometry, means: Tensor, shares: Tensor | None, received: list[Tensor]) -> Means:
    """Return the means of one tensor from its summed messages.

    Args:
        geometry: the shard.
        means: this rank's share of the mean square of each local block; changed.
        shares: this rank's share of the mean square of each local column; changed. None if the tensor is not factored.
        received: the summed messages, in the order of ``_messages``.
    """
    cut, columns = geometry.cut, geometry.columns
    assert cut is not None
    means[cut.slots.to(means.device)] = received[0][cut.positions.to(received[0].device)].to(means.device)
    if columns is None or shares is None:
        return Means(means)
    shares[columns.slots.to(shares.device)] = received[1][columns.positions.to(received[1].device)].to(shares.device)
    if not columns.row_groups:
        return Means(means, shares)
    before, fresh = (x[columns.mean_positions.to(x.device)].to(shares.device) for x in received[2:])
    return Means(means, shares, fresh, before)


def second_moments(works: Sequence[Work]) -> list[dict[str, Tensor]]:
    """Return block means in the shape of local second moments, for tensors with and without shared blocks.

    Args:
        works: the tensors; those without shared blocks have a geometry without a cut. Every rank of a group must pass
            the same tensors in the same order.

    Returns:
        For each tensor, the local values of ``exp_avg_sq``: the mean squared gradient of its blocks, shape
        ``geometry.aligned``; and of ``exp_avg_sq_col`` if it is factored. Zeros if there is no gradient.
    """
    cut = [i for i, work in enumerate(works) if work.geometry.cut is not None]
    means = dict(zip(cut, block_means([works[i] for i in cut]), strict=True))
    return [_second_moment(work, means.get(i)) for i, work in enumerate(works)]


def _second_moment(work: Work, means: Means | None) -> dict[str, Tensor]:
    """Return the local second moment of one tensor; see ``second_moments``."""
    geometry, grad, dtype, _ = work
    columns = None if geometry.columns is None else torch.zeros(geometry.columns.shape, dtype=dtype)
    if means is not None and geometry.cut is not None:
        spread = geometry.cut.blocks.spread
        second = means.blocks if spread is None else means.blocks[spread.to(means.blocks.device)]
        second = second.reshape(geometry.aligned)
        if columns is not None and means.columns is not None:
            columns = means.columns.reshape(columns.shape)
        for box in geometry.free if grad is not None else ():
            view = box.of(grad)  # type: ignore[arg-type]
            own = box.of_second(second, tuple(view.shape))
            if isinstance(box.layout, Layout):
                own.copy_(block_mean_square(view, box.layout))
                continue
            assert columns is not None
            for target, mean in zip((own, box.of_columns(columns)), factored_means(view, box.layout), strict=True):
                target.copy_(mean)
    elif grad is not None and geometry.boxes:
        box = geometry.boxes[0]
        if isinstance(box.layout, FactoredLayout):
            second, columns = factored_means(box.of(grad), box.layout)
        else:
            second = block_mean_square(box.of(grad), box.layout)
    else:
        second = torch.zeros(geometry.aligned, dtype=dtype)
    out = {"exp_avg_sq": second.reshape(geometry.aligned)}
    return out if columns is None else {**out, "exp_avg_sq_col": columns.reshape(geometry.columns.shape)}  # type: ignore[union-attr]


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
    if grad is None or not grad.numel():
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
