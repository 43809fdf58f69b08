"""Forward and backward passes of a step: micro-batches, precision, and compiled blocks.

A batch of a recipe does not fit a device at once. It is cut into micro-batches, whose losses are weighted by their
share of the rows, so that loss and gradient are those of the whole batch up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.models import lm_loss

Batch = tuple[Tensor, ...]


def micro_batches(batch: Batch, rows: int) -> Iterator[tuple[Batch, float]]:
    """Cut a batch into pieces of at most ``rows`` rows; 0 for one piece.

    Args:
        batch: tensors with equal numbers of rows, such as (inputs, targets).
        rows: rows per piece; the last piece may have fewer.

    Yields:
        (piece, its share of the rows); the shares add up to 1.
    """
    total = len(batch[0])
    size = rows or total
    for start in range(0, total, size):
        piece = tuple(part[start : start + size] for part in batch)
        yield piece, len(piece[0]) / total


def cast(device: torch.device, precision: str, parallel: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns the context of a forward pass.

    Args:
        device: device of the model.
        precision: ``fp32`` or ``bf16``.
        parallel: kind of the team. FSDP2 casts by itself, when it gathers parameters (``Team.wrap``).
    """
    if precision == "fp32" or parallel == "fsdp2":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def backward(
    model: nn.Module,
    batch: Batch,
    *,
    rows: int = 0,
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss_of: Callable[[nn.Module, Batch], Tensor] = lm_loss,
) -> Tensor:
    """Add the gradient of a batch's mean loss to the parameters, micro-batch by micro-batch.

    DDP reduces gradients once, in the last backward pass. FSDP2 reduces them in each, because unreduced gradients would
    need the memory of the whole model.

    Args:
        model: the module to call: the model, or DDP around it.
        batch: this process's rows of the batch.
        rows: rows per micro-batch; 0 for all at once.
        casting: returns the context of a forward pass.
        loss_of: (module, rows of a batch) -> their mean loss.

    Returns:
        The loss, without its graph.
    """
    pieces = list(micro_batches(batch, rows))
    total: Tensor | None = None
    for i, (piece, share) in enumerate(pieces):
        waits = isinstance(model, DistributedDataParallel) and i + 1 < len(pieces)
        with model.no_sync() if waits else nullcontext():
            with casting():
                loss = loss_of(model, piece)
            loss = loss if len(pieces) == 1 else share * loss
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None  # a batch has a row
    return total


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rows: int = 0,
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Return the mean loss over fixed batches of equal size.

    Args:
        model: the model.
        batches: the batches.
        rows: rows per forward pass; 0 for a batch at once.
        casting: returns the context of a forward pass.
    """
    with casting():
        losses = [
            sum(share * lm_loss(model, piece).item() for piece, share in micro_batches(batch, rows))
            for batch in batches
        ]
    return sum(losses) / len(losses)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: the members of its module lists."""
    return [block for layers in model.modules() if isinstance(layers, nn.ModuleList) for block in layers]


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward pass of each layer, in place and under the same parameter names.

    Equal layers share one compiled graph, so the time to compile does not grow with their number. Hooks of FSDP2 and
    gradient checkpointing stay outside of it.
    """
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
