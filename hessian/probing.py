"""Norms of an operator's blocks from matrix-vector products, for models whose dense Hessian does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import symmetry
from .checks import at_least, finite
from .linear import LinearMap
from .results import BlockNorms, Estimate


def check_block_ids(block_ids: Tensor, n: int) -> int:
    """Check block ids and return the number of blocks B.

    Args:
        block_ids: int64 [n]; they must use every number 0, 1, ..., B - 1.
        n: number of parameters.

    Raises:
        TypeError: block_ids is not a tensor.
        ValueError: block_ids is empty, does not have length n, is not int64, or skips a number.
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
    """Estimate the squared Frobenius norms of all blocks, from Rademacher probes supported on one block each.

    For v_b with independent signs on block b and zeros elsewhere, E ||(H v_b)_c||^2 = ||H_cb||_F^2. This costs one
    product per block and probe. The operator is symmetric, so probes on b and probes on c both estimate the norm of
    block (b, c); the result is the mean of the two estimates, or the exact one of them if there is one.

    Args:
        operator: symmetric, order n.
        block_ids: int64 [n], blocks numbered 0, 1, ..., B - 1.
        probes: probes per block, >= 2; a block of one element uses a single probe, which is exact.
        seed: seed of the signs.
        chunk: number of products computed at a time.
        progress: called with (products done, products in all).

    Returns:
        ``BlockNorms`` with mean and standard error, [B, B] each.

    Raises:
        TypeError: block_ids is not a tensor, or probes or chunk is not an integer.
        ValueError: block_ids does not cover the parameters, probes is below 2, chunk is below 1, or the products are
            not finite or show that the operator is not symmetric.
    """
    n = operator.shape[0]
    blocks = check_block_ids(block_ids, n)
    at_least("probes", probes, 2, "a standard error needs two")
    at_least("chunk", chunk, 1, "it is the number of products computed at a time")
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
        symmetry.require(vectors, products, operator.dtype)
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
    """Estimate the variance of the mean over probes, [B, probes, B] -> [B, B], rather too high than too low.

    A few skewed samples that are all small also have a small sample variance. Each entry therefore gets the larger of
    two variances: its sample variance, and the one predicted from its mean by the relative variance of all entries of
    the same source block.
    """
    mean, sample_variance = samples.mean(1), samples.var(1)
    relative = sample_variance.sum(1, keepdim=True) / mean.square().sum(1, keepdim=True).clamp_min(1e-300)
    return torch.maximum(sample_variance, relative * mean.square()) / samples.shape[1]


def _both_sides(mean: Tensor, variance: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Average the two estimates of each block; return mean and standard error.

    Args:
        mean: [B, B], entry (b, c) estimated from probes on block b.
        variance: [B, B], variances of ``mean``.
        exact: bool [B]; the estimates from these blocks are exact and replace the estimates of the same norms from
            other blocks.
    """
    weight = torch.full_like(mean, 0.5)
    weight[exact] = 1.0
    weight[:, exact] = 0.0
    weight[exact[:, None] & exact[None, :]] = 0.5
    mean = weight * mean + weight.T * mean.T
    both = (weight.square() * variance + weight.T.square() * variance.T).sqrt()
    diagonal = torch.eye(len(mean), dtype=torch.bool)  # Both estimates of a diagonal block are the same number.
    return mean, torch.where(diagonal, variance.sqrt(), both)


def energy_inside(operator: LinearMap, block_ids: Tensor, probes: int = 8, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Estimate how much of an operator's squared Frobenius norm lies inside the blocks of a partition.

    Every probe z has random signs. Signs s and t, one for each block, make two vectors of it: s z and t z. In
    s_b (A s z)_b, the parts from other blocks than b have random signs, so the mean of the product of both results is
    ||A_bb z_b||^2, whose mean over z is ||A_bb||^2. This costs two products per probe, for any number of blocks.

    Args:
        operator: symmetric, order n.
        block_ids: int64 [n], blocks numbered 0, 1, ..., B - 1.
        probes: number of probes, >= 2.
        seed: seed of the signs.

    Returns:
        (sum of ||A_bb||_F^2 over blocks, ||A||_F^2), with standard errors over probes. The first can be negative where
        little lies inside the blocks.

    Raises:
        TypeError: block_ids is not a tensor, or probes is not an integer.
        ValueError: block_ids does not cover the parameters, probes is below 2, or the products are not finite or show
            that the operator is not symmetric.
    """
    n = operator.shape[0]
    blocks = check_block_ids(block_ids, n)
    at_least("probes", probes, 2, "a standard error needs two")
    generator = torch.Generator().manual_seed(seed)

    def signs(rows: int, columns: int) -> Tensor:
        return torch.randint(0, 2, (rows, columns), generator=generator).mul_(2).sub_(1).to(torch.float64)

    z, ids = signs(n, probes), block_ids.cpu()
    first, second = signs(blocks, probes)[ids], signs(blocks, probes)[ids]
    vectors = torch.cat([first * z, second * z], dim=1).to(operator.device, operator.dtype)
    products = operator.matmat(vectors)
    finite("a product of the operator", products)
    symmetry.require(vectors, products, operator.dtype)
    one, two = products.to("cpu", torch.float64).split(probes, dim=1)
    samples = ((first * one) * (second * two)).sum(0), 0.5 * (one.square() + two.square()).sum(0)
    inside, whole = (Estimate(x.mean(), x.std() / math.sqrt(probes), probes, 2 * probes) for x in samples)
    return inside, whole
