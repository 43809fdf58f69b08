"""Norms of an operator's blocks from products alone: it scales to models whose Hessian never fits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import at_least, finite
from .operators import LinearMap
from .results import BlockNorms


def check_block_ids(block_ids: Tensor, n: int) -> int:
    """The number of blocks.

    Raises:
        TypeError: not a tensor.
        ValueError: none, another length than n, not int64, or numbers that are not 0, 1, ..., B - 1.
    """
    if not isinstance(block_ids, Tensor):
        raise TypeError(f"block_ids is a {type(block_ids).__name__}; it must be an int64 tensor: torch.as_tensor(ids)")
    if not n:
        raise ValueError("block_ids is empty: there is nothing to partition")
    if block_ids.dim() != 1 or len(block_ids) != n:
        raise ValueError(f"block_ids has shape {tuple(block_ids.shape)}; give one id for each of the {n} parameters")
    if block_ids.dtype != torch.int64:
        raise ValueError(f"block_ids has dtype {block_ids.dtype}; it must be int64: pass block_ids.long()")
    present = torch.unique(block_ids)
    if not torch.equal(present, torch.arange(len(present), dtype=present.dtype, device=present.device)):
        raise ValueError(
            f"block_ids must use every number 0, 1, ..., B - 1; found {len(present)} ids from {int(present[0])} to "
            f"{int(present[-1])}; renumber them (torch.unique(ids, return_inverse=True))"
        )
    return len(present)


def block_norms(
    operator: LinearMap,
    block_ids: Tensor,
    probes: int = 8,
    seed: int = 0,
    *,
    chunk: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> BlockNorms:
    """Squared Frobenius norms of all blocks, from Rademacher probes supported on one block each.

    For v_b of independent signs on block b and zero elsewhere, E ||(H v_b)_c||^2 = ||H_cb||_F^2. One product per block
    and probe. A symmetric operator's block is seen from both of its sides, and the two estimates are averaged (where
    one is exact, it stands alone).

    Args:
        operator: symmetric, order n.
        block_ids: int64 [n], blocks numbered 0, 1, ..., B - 1.
        probes: probes per block, >= 2 (blocks of one element need and use one).
        seed: of the signs.
        chunk: products at a time.
        progress: called with (products done, products in all).

    Returns:
        ``BlockNorms`` with mean and standard error, [B, B] each.

    Raises:
        TypeError: ids that are no tensor; probes or a chunk that are no integers.
        ValueError: ids that do not cover the parameters, fewer than two probes, a chunk below 1, or products with NaN
            or infinite entries.
    """
    n = operator.shape[0]
    blocks = check_block_ids(block_ids, n)
    at_least("probes", probes, 2, "a standard error needs two")
    at_least("chunk", chunk, 1, "how many products are asked for at a time")
    ids = block_ids.to(operator.device)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.bincount(ids, minlength=blocks)
    order = [(b, p) for b in range(blocks) for p in range(1 if sizes[b] == 1 else probes)]
    samples = torch.zeros(blocks, probes, blocks, dtype=torch.float64)
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        signs = torch.randint(0, 2, (n, len(part)), generator=generator).mul_(2).sub_(1)
        support = ids.cpu().unsqueeze(1) == torch.tensor([b for b, _ in part])
        vectors = (signs * support).to(operator.device, operator.dtype)
        products = operator.matmat(vectors)
        finite("a product of the operator", products)
        squares = products.to(torch.float64).square()
        sums = torch.zeros(blocks, len(part), dtype=torch.float64, device=ids.device).index_add_(0, ids, squares).cpu()
        for column, (b, p) in enumerate(part):
            samples[b, p] = sums[:, column]
        if progress is not None:
            progress(start + len(part), len(order))
    single = (sizes == 1).cpu()
    samples[single] = samples[single][:, :1]
    return BlockNorms(*_both_sides(samples.mean(1), _variance_of_mean(samples), single), probes)


def _variance_of_mean(samples: Tensor) -> Tensor:
    """[B, probes, B] -> [B, B], cautious: a few skewed samples that all fall low also look as if they vary little.

    The larger of an entry's own variance and the one that the relative variance of all probes of its source block
    predicts from its size.
    """
    mean, own = samples.mean(1), samples.var(1)
    relative = own.sum(1, keepdim=True) / mean.square().sum(1, keepdim=True).clamp_min(1e-300)
    return torch.maximum(own, relative * mean.square()) / samples.shape[1]


def _both_sides(mean: Tensor, variance: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the symmetric matrix; a row that is exact overrules the column it meets."""
    weight = torch.full_like(mean, 0.5)
    weight[exact] = 1.0
    weight[:, exact] = 0.0
    weight[exact[:, None] & exact[None, :]] = 0.5
    mean = weight * mean + weight.T * mean.T
    both = (weight.square() * variance + weight.T.square() * variance.T).sqrt()
    alone = torch.eye(len(mean), dtype=torch.bool)  # a diagonal block has one side only
    return mean, torch.where(alone, variance.sqrt(), both)
