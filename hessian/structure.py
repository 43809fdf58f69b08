"""Measures of structure: does a partition contain more of a matrix than a random partition of the same sizes?"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_least, finite, square
from .probing import check_block_ids
from .results import BlockStructure

ROUNDING = 1e-10
"""A relative spread below this value is only the rounding of float64 sums of n^2 terms."""


def block_structure(matrix: Tensor, block_ids: Tensor, permutations: int = 200, seed: int = 0) -> BlockStructure:
    """Compare the mass inside the blocks of a partition with that of size-matched random partitions.

    The diagonal lies inside every partition and would hide the difference, so it is left out.

    Args:
        matrix: [n, n]; the absolute values of its entries count.
        block_ids: int64 [n], blocks numbered 0, 1, ..., B - 1.
        permutations: number of random partitions.
        seed: seed of the random partitions.

    Returns:
        ``BlockStructure``.

    Raises:
        TypeError: matrix is not a floating-point tensor, block_ids is not a tensor, or permutations is not an integer.
        ValueError: matrix is not square, is empty or is not finite; block_ids does not cover it; or permutations is
            below 2.
    """
    square(matrix)
    at_least("permutations", permutations, 2, "the null needs a standard deviation")
    blocks = check_block_ids(block_ids, len(matrix))
    magnitude = matrix.abs().to(torch.float64)
    magnitude.fill_diagonal_(0)
    total, n = float(magnitude.sum()), len(matrix)
    sizes = torch.bincount(block_ids, minlength=blocks).to(torch.float64)
    pairs = float((sizes * (sizes - 1)).sum())
    others = n * (n - 1) - pairs
    if total == 0 or pairs == 0 or others == 0:
        share = 1.0 if others == 0 and total > 0 else 0.0
        return BlockStructure(share, share, 0.0, 1.0, permutations)
    inside = _mass(magnitude, block_ids, sizes) / total
    generator = torch.Generator().manual_seed(seed)
    shuffled = (block_ids[torch.randperm(n, generator=generator)] for _ in range(permutations))
    null = torch.tensor([_mass(magnitude, ids, sizes) / total for ids in shuffled], dtype=torch.float64)
    spread = float(null.std())
    # In a constant matrix all random partitions contain the same mass, and dividing by the rounding means nothing.
    z = (inside - float(null.mean())) / spread if spread > ROUNDING * float(null.mean()) else 0.0
    outside_mean = (1 - inside) * total / others
    ratio = (inside * total / pairs) / outside_mean if outside_mean > 0 else float("inf")
    return BlockStructure(inside, float(null.mean()), z, ratio, permutations)


def _mass(magnitude: Tensor, ids: Tensor, sizes: Tensor) -> float:
    """Return the sum of the entries inside the blocks."""
    if len(sizes) <= 16:  # For few blocks, multiplying by an indicator matrix is cheaper than gathering entries.
        indicator = torch.nn.functional.one_hot(ids, len(sizes)).to(magnitude.dtype)
        return float(((magnitude @ indicator) * indicator).sum())
    # Blocks of one size are gathered in one batch, so there is one pass per distinct size.
    order = torch.argsort(ids, stable=True)
    total = 0.0
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).long()
    for size in sizes.unique().long().tolist():
        firsts = starts[:-1][sizes == size]
        members = order[firsts[:, None] + torch.arange(size, device=order.device)]
        total += float(magnitude[members[:, :, None], members[:, None, :]].sum())
    return total


def tau(matrix: Tensor) -> float:
    """Return the share of |A| on the diagonal, the Adam-mini paper's tau (arXiv 2406.16793).

    It is 1 for a diagonal matrix, including the zero matrix.

    Raises:
        TypeError: matrix is not a floating-point tensor.
        ValueError: matrix is not square, is empty, or has NaN or infinite entries.
    """
    square(matrix)
    magnitude = matrix.abs()
    total = float(magnitude.sum())
    return float(magnitude.diagonal().sum()) / total if total else 1.0


def preconditioned_ratio(matrix: Tensor) -> float:
    """Return the condition number after scaling by |diagonal|^(-1/2) on both sides, divided by the one before.

    This is the Adam-mini paper's r (arXiv 2406.16793). It is below 1 if diagonal preconditioning as in Adam helps. The
    condition number is the ratio of the largest to the smallest absolute eigenvalue, also for indefinite matrices.

    Raises:
        TypeError: matrix is not a floating-point tensor.
        ValueError: matrix is not square, is empty or is not finite; has a zero on its diagonal; or is singular.
    """
    square(matrix)
    diagonal = matrix.diagonal().abs()
    if bool((diagonal == 0).any()):
        raise ValueError(
            "matrix has a zero on its diagonal; leave those rows and columns out: they have no diagonal scaling"
        )
    scaled = matrix * diagonal.rsqrt()[:, None] * diagonal.rsqrt()[None, :]
    before, after = (torch.linalg.eigvalsh(m.to(torch.float64)).abs() for m in (matrix, scaled))
    if float(before.min()) == 0 or float(after.min()) == 0:
        raise ValueError("matrix is singular; its condition number is infinite")
    return float((after.max() / after.min()) / (before.max() / before.min()))


def snr(v: Tensor, axis: int) -> float:
    """Return SlimAdam's signal-to-noise ratio of second moments along an axis.

    SNR_K(v) = E_K'[(E_K v)^2 / Var_K v] (arXiv 2503.01843). It is high if v hardly varies along the axis K, so that
    elements along K can share one second moment.

    Args:
        v: second moments, [..., K, ...], non-negative.
        axis: index of the axis K.

    Raises:
        TypeError: v is not a tensor.
        ValueError: v is empty, has negative, NaN or infinite entries, or does not have the axis.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"v is a {type(v).__name__}; it must be a tensor of second moments")
    if not v.numel() or bool((v < 0).any()):
        raise ValueError(f"v of shape {tuple(v.shape)} is empty or has negative entries; second moments are at least 0")
    finite("v", v)
    if not -v.dim() <= axis < v.dim():
        raise ValueError(f"axis={axis} is none of the {v.dim()} axes of v; choose one from {-v.dim()} to {v.dim() - 1}")
    mean = v.to(torch.float64).mean(axis)
    variance = v.to(torch.float64).var(axis, unbiased=False)
    return float((mean.square() / variance.clamp_min(1e-300)).clamp_max(1e12).mean())
