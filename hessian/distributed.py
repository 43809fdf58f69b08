"""One operator over the batches of all ranks of a process group."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .operators import HessianOperator
from .weights import tensors_of


class RankOperator:
    """The weighted mean of every rank's operator; each product takes one all-reduce.

    Every rank builds an operator over its own batches at the same weights, and this one of it. Products are equal on
    all ranks, so an algorithm that draws its probes from the same seed on every rank stays in step.

    Args:
        operator: this rank's ``HessianOperator`` or ``GGNOperator``.
        count: what the losses of this rank's batches are a mean over, in all: examples, or predicted tokens.
        group: the process group; None for all ranks.

    Raises:
        ValueError: on every rank: a count is not positive and finite, or the ranks' operators have other parameters,
            dtypes, weights or kinds. Products raise it, too, if the ranks multiply different vectors.

    Warns:
        UserWarning: several ranks have the same batches, so that these count several times.

    Example:
        >>> H = RankOperator(HessianOperator(model, loss, None, batches_of_this_rank), count=number_of_tokens)
        >>> slq(H)  # on every rank
    """

    def __init__(self, operator: HessianOperator, count: float, group: Any = None) -> None:
        self._operator, self._group = operator, group
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        weights = _digest(operator.parameters.items())
        own = (float(count), operator.shape[0], str(operator.dtype), weights, type(operator).__name__)
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
        for rank, other in enumerate(everyone):
            if not (math.isfinite(other[0]) and other[0] > 0):
                raise ValueError(f"count={other[0]} of rank {rank} must be positive and finite; give it a batch")
            for what, ours, theirs in zip(
                ("parameters in number", "dtype", "weights", "kind"), everyone[0][1:], other[1:], strict=True
            ):
                if ours != theirs:
                    raise ValueError(
                        f"the operator of rank {rank} has other {what} than that of rank 0: {theirs} and {ours}; "
                        "load one checkpoint on every rank, and build the same operator of it"
                    )
        self._share = own[0] / sum(other[0] for other in everyone)
        self._warn_of_equal_batches()

    def _warn_of_equal_batches(self) -> None:
        data = _digest([item for batch in self._operator.batches for item in tensors_of(batch).items()])
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, data, group=self._group)
        twins = [rank for rank, other in enumerate(everyone) if everyone.count(other) > 1]
        if twins:
            warnings.warn(
                f"ranks {twins} have batches that another rank has, too, so they count several times; give every rank "
                "its own batches, as torch.utils.data.DistributedSampler does",
                stacklevel=3,
            )

    def _check_equal(self, vectors: Tensor) -> None:
        """Raise ValueError on every rank if the ranks' vectors differ; one small all-reduce."""
        ramp = torch.linspace(1, 2, len(vectors), dtype=torch.float64, device=self.device)
        mark = (ramp @ vectors.to(self.device, torch.float64)).sum()
        ends = torch.stack([mark, -mark])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        if bool(ends.isfinite().all()) and float(ends.sum()) > 1e-9 * float(ends.abs().max()):
            raise ValueError(
                "vectors differ between ranks, so the sum of the ranks' products would be that of no vector; draw them "
                "from the same seed on every rank"
            )

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors, [n, k] -> [n, k]. They must be equal on all ranks."""
        self._check_equal(vectors)
        out = (self._operator.matmat(vectors) * self._share).contiguous()
        dist.all_reduce(out, group=self._group)
        return out

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self.matmat(vectors.unsqueeze(1)).squeeze(1)
        return self.matmat(vectors)


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of tensors' names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
