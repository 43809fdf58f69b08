"""Is a partition visible in a matrix, or would any partition of the same sizes do as well?"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_least, finite, square
from .probing import check_block_ids
from .results import BlockStructure

ROUNDING = 1e-10
"""A relative spread below this is the rounding of sums in float64 (n^2 terms), not a spread."""


def block_structure(matrix: Tensor, block_ids: Tensor, permutations: int = 200, seed: int = 0) -> BlockStructure:
    """Mass inside the blocks of a partition against size-matched random partitions.

    The diagonal lies inside every partition and would hide the difference, so it is left out.

    Args:
        matrix: [n, n], any sign; |A| counts.
        block_ids: int64 [n], blocks numbered 0, 1, ..., B - 1.
        permutations: random partitions in the null.
        seed: of the permutations.

    Returns:
        ``BlockStructure``.

    Raises:
        TypeError: a matrix that is no floating-point tensor, ids that are no tensor, permutations that are no integer.
        ValueError: not square, empty, NaN or infinite, ids that do not cover it, or fewer than two permutations.
    """
    square(matrix)
    at_least("permutations", permutations, 2, "the null needs a spread")
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
    # Random partitions of a constant matrix hold the same mass but for rounding, which says nothing.
    z = (inside - float(null.mean())) / spread if spread > ROUNDING * float(null.mean()) else 0.0
    outside_mean = (1 - inside) * total / others
    ratio = (inside * total / pairs) / outside_mean if outside_mean > 0 else float("inf")
    return BlockStructure(inside, float(null.mean()), z, ratio, permutations)


def _mass(magnitude: Tensor, ids: Tensor, sizes: Tensor) -> float:
    """Sum of the entries inside blocks: gather each block's rows and columns, or multiply by indicators if cheaper."""
    if len(sizes) <= 16:
        indicator = torch.nn.functional.one_hot(ids, len(sizes)).to(magnitude.dtype)
        return float(((magnitude @ indicator) * indicator).sum())
    # One batched gather when all blocks have one size; a loop over sizes otherwise.
    order = torch.argsort(ids, stable=True)
    total = 0.0
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).long()
    for size in sizes.unique().long().tolist():
        firsts = starts[:-1][sizes == size]
        members = order[firsts[:, None] + torch.arange(size, device=order.device)]
        total += float(magnitude[members[:, :, None], members[:, None, :]].sum())
    return total


def tau(matrix: Tensor) -> float:
    """Share of |A| on the diagonal, 1 for a diagonal matrix, also of zeros (the Adam-mini paper's tau, 2406.16793).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not square, empty, NaN or infinite.
    """
    square(matrix)
    magnitude = matrix.abs()
    total = float(magnitude.sum())
    return float(magnitude.diagonal().sum()) / total if total else 1.0


def preconditioned_ratio(matrix: Tensor) -> float:
    """Condition number after scaling by |diagonal|^(-1/2) on both sides, over the one before.

    The Adam-mini paper's r: below 1 where Adam's diagonal helps. For an indefinite matrix the absolute eigenvalues
    stand in, as a saddle-free method would see.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not square, empty, NaN or infinite; a zero on the diagonal, or a singular matrix.
    """
    square(matrix)
    diagonal = matrix.diagonal().abs()
    if bool((diagonal == 0).any()):
        raise ValueError("matrix has a zero on its diagonal; leave those rows out: no diagonal scaling exists there")
    scaled = matrix * diagonal.rsqrt()[:, None] * diagonal.rsqrt()[None, :]
    before, after = (torch.linalg.eigvalsh(m.to(torch.float64)).abs() for m in (matrix, scaled))
    if float(before.min()) == 0 or float(after.min()) == 0:
        raise ValueError("matrix is singular; its condition number is infinite")
    return float((after.max() / after.min()) / (before.max() / before.min()))


def snr(v: Tensor, axis: int) -> float:
    """SlimAdam's signal-to-noise ratio of second moments along the axis that would share one.

    SNR_K(v) = E_K'[(E_K v)^2 / Var_K v] (arXiv 2503.01843): high where v hardly varies along K = ``axis``.

    Args:
        v: second moments, [..., K, ...], non-negative.
        axis: K.

    Raises:
        TypeError: not a tensor.
        ValueError: empty, negative, NaN or infinite; an axis that v does not have.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"v is a {type(v).__name__}; it must be a tensor of second moments")
    if not v.numel() or bool((v < 0).any()):
        raise ValueError(f"v of shape {tuple(v.shape)} is empty or has negative entries; second moments are at least 0")
    finite("v", v)
    if not -v.dim() <= axis < v.dim():
        raise ValueError(f"axis={axis} is none of the {v.dim()} axes of v")
    mean = v.to(torch.float64).mean(axis)
    variance = v.to(torch.float64).var(axis, unbiased=False)
    return float((mean.square() / variance.clamp_min(1e-300)).clamp_max(1e12).mean())
