"""Estimates from one probe at a time, for operators whose vectors fill the memory and whose products take seconds.

``probing`` needs all its vectors at once. Here every call is one sample that depends on its seed alone, so a study can
store the samples, stop between two of them, and add more. Means and standard errors are taken over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from .checks import at_least, finite
from .linear import LinearMap
from .symmetry import random_signs

Signs = Callable[[Generator], Tensor]
"""Draws one random sign for each block of a partition, and returns the sign of every parameter's block, int8 [n]."""
WHOLE = "whole"


def signs_of_blocks(block_ids: Tensor) -> Signs:
    """Return the signs of a partition that is given by the block of every parameter.

    Args:
        block_ids: int64 [n], blocks numbered 0, 1, ...
    """
    return lambda generator: random_signs(int(block_ids.max()) + 1, generator)[block_ids]


def energies(
    operator: LinearMap,
    partitions: Mapping[str, Signs],
    segments: Sequence[int],
    seed: int,
    draws: int = 2,
    together: int = 1,
    support: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Sample how much of an operator's squared Frobenius norm lies inside the blocks of several partitions.

    With z of random signs and R the diagonal matrix of the blocks' signs, R A R z is what the blocks make of z, plus
    parts from other blocks, which keep a random sign. So entry i of R A R z times entry i of R' A R' z, for independent
    R and R', has the mean sum_j A_ij^2 over the j in the block of i. ``draws`` matrices R, the first of which is the
    identity, make draws (draws - 1) / 2 such pairs. All partitions have A z in common.

    Args:
        operator: symmetric, order n.
        partitions: name -> signs of its blocks.
        segments: sizes of consecutive ranges of parameters, which are summed separately; their sum is n.
        seed: seed of this sample.
        draws: number of R for each partition, >= 2; a sample costs 1 + (draws - 1) x partitions products.
        together: number of products computed at a time, >= 1. The memory grows with it.
        support: (first parameter, the one after the last) of a range of parameters; z is zero elsewhere, and j below
            stays in the range. What a partition's estimate says inside the range has then no noise from outside of it,
            which matters for partitions into few blocks: a few large blocks between them with random signs can deceive
            a standard error from few samples.

    Returns:
        name of the partition -> float64 [segments]: a sample of the sum of A_ij^2 over i in the segment and j in the
        block of i. ``WHOLE`` -> the same over all j, averaged over all products. A sample can be negative where little
        lies inside the blocks.

    Raises:
        TypeError: draws or together is not an integer.
        ValueError: the segments do not cover the parameters, a partition has the name ``WHOLE``, draws is below 2,
            together is below 1, or a product has NaN or infinite entries.
    """
    at_least("draws", draws, 2, "an estimate needs a pair of products")
    at_least("together", together, 1)
    _require_cover(segments, operator.shape[0])
    if WHOLE in partitions:
        raise ValueError(f"partitions has the name {WHOLE!r}, which the whole operator has; give it another name")
    generator = torch.Generator().manual_seed(seed)
    z = random_signs(operator.shape[0], generator)
    if support is not None:
        z[: support[0]] = 0
        z[support[1] :] = 0
    first = _products(operator, [z])[0]
    first_squares = _sums(first, segments)
    whole, out = first_squares.clone(), {}
    for name, draw in partitions.items():
        total, squares = first.clone(), first_squares.clone()
        for done in range(0, draws - 1, together):
            signs = [draw(generator) for _ in range(min(together, draws - 1 - done))]
            for sign, product in zip(signs, _products(operator, [sign * z for sign in signs]), strict=True):
                total += product.mul_(sign)
                of_product = _sums(product, segments)
                squares += of_product
                whole += of_product
        out[name] = (_sums(total, segments) - squares) / (draws * (draws - 1))
    return {WHOLE: whole / (1 + (draws - 1) * len(partitions)), **out}


def block_columns(operator: LinearMap, ranges: Sequence[tuple[int, int]], segments: Sequence[int], seed: int) -> Tensor:
    """Sample the squared Frobenius norms of the blocks between some ranges of parameters and every segment.

    For v of random signs in a range and zeros elsewhere, E ||(A v)_s||^2 is the squared norm of block (s, range). All
    ranges are multiplied together.

    Args:
        operator: symmetric, order n.
        ranges: (first parameter, the one after the last) of every range.
        segments: sizes of consecutive ranges of parameters; their sum is n.
        seed: seed of this sample.

    Returns:
        float64 [ranges, segments].

    Raises:
        ValueError: the segments do not cover the parameters, or a product has NaN or infinite entries.
    """
    _require_cover(segments, operator.shape[0])
    generator, vectors = torch.Generator().manual_seed(seed), []
    for start, stop in ranges:
        vector = torch.zeros(operator.shape[0], dtype=torch.int8)
        vector[start:stop] = random_signs(stop - start, generator)
        vectors.append(vector)
    return torch.stack([_sums(product, segments) for product in _products(operator, vectors)])


def _require_cover(segments: Sequence[int], n: int) -> None:
    if sum(segments) != n:
        raise ValueError(f"segments={list(segments)[:8]}... sum to {sum(segments)}; they must cover all {n} parameters")


def _products(operator: LinearMap, vectors: Sequence[Tensor]) -> Tensor:
    """Return A times each vector of signs, on the CPU, [vectors, n]."""
    columns = torch.empty(len(vectors), operator.shape[0], device=operator.device, dtype=operator.dtype)
    for row, vector in zip(columns, vectors, strict=True):
        row.copy_(vector)
    products = operator.matmat(columns.T)
    finite("a product of the operator", products)
    return products.T.cpu()


def _sums(vector: Tensor, segments: Sequence[int]) -> Tensor:
    """Return the squared norms of the segments of a vector, float64 [segments]."""
    return torch.stack([part.to(torch.float64).square().sum() for part in vector.split(list(segments))])
