"""One operator over the batches of all ranks of a process group."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .operators import HessianOperator


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
            dtypes or weights.

    Example:
        >>> H = RankOperator(HessianOperator(model, loss, None, batches_of_this_rank), count=number_of_tokens)
        >>> slq(H)  # on every rank
    """

    def __init__(self, operator: HessianOperator, count: float, group: Any = None) -> None:
        self._operator, self._group = operator, group
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        own = (float(count), operator.shape[0], str(operator.dtype), _digest(operator))
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
        for rank, other in enumerate(everyone):
            if not (math.isfinite(other[0]) and other[0] > 0):
                raise ValueError(f"count={other[0]} of rank {rank} must be positive and finite; give it a batch")
            for what, ours, theirs in zip(
                ("parameters in number", "dtype", "weights"), everyone[0][1:], other[1:], strict=True
            ):
                if ours != theirs:
                    raise ValueError(
                        f"the operator of rank {rank} has other {what} than that of rank 0: {theirs} and {ours}; "
                        "load one checkpoint on every rank before you build the operators"
                    )
        self._share = own[0] / sum(other[0] for other in everyone)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors, [n, k] -> [n, k]. They must be equal on all ranks."""
        out = (self._operator.matmat(vectors) * self._share).contiguous()
        dist.all_reduce(out, group=self._group)
        return out

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self.matmat(vectors.unsqueeze(1)).squeeze(1)
        return self.matmat(vectors)


def _digest(operator: HessianOperator) -> str:
    """Return a hash of the weights' names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in operator.parameters.items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
