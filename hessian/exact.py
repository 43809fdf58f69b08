"""The Hessian as a matrix, where it fits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import at_least
from .operators import LinearMap

DEFAULT_MAX_BYTES = 4 * 2**30


def dense(
    operator: LinearMap,
    *,
    chunk: int = 64,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Every column of an operator.

    Memory beyond the result is that of one chunk of products.

    Args:
        operator: ``HessianOperator`` or any ``LinearMap``.
        chunk: columns asked for at a time.
        max_bytes: refuse a larger result.
        progress: called with (columns done, columns in all) after each chunk.

    Returns:
        [n, n], column j the product with the j-th unit vector; symmetric up to rounding.

    Raises:
        TypeError: a chunk that is no integer.
        ValueError: the result would be larger than ``max_bytes``, or a chunk below 1.
    """
    at_least("chunk", chunk, 1, "how many products are asked for at a time")
    n = operator.shape[0]
    needed = n * n * operator.dtype.itemsize
    if needed > max_bytes:
        raise ValueError(
            f"a dense Hessian of n={n:,} parameters needs {needed:,} bytes, more than max_bytes={max_bytes:,}; use slq "
            "for its spectrum, block_norms for its block structure, or fewer params"
        )
    rows = torch.empty(n, n, dtype=operator.dtype, device=operator.device)
    for start in range(0, n, chunk):
        width = min(chunk, n - start)
        units = torch.zeros(n, width, dtype=operator.dtype, device=operator.device)
        units[start : start + width].fill_diagonal_(1)
        rows[start : start + width] = operator.matmat(units).T
        if progress is not None:
            progress(start + width, n)
    return rows.T
