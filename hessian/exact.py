"""The Hessian as a dense matrix, for models small enough that it fits in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import at_least
from .linear import LinearMap

DEFAULT_MAX_BYTES = 4 * 2**30


def dense(
    operator: LinearMap,
    *,
    chunk: int = 64,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Compute every column of an operator.

    In addition to the result, memory is needed for one chunk of products.

    Args:
        operator: ``HessianOperator`` or any ``LinearMap``.
        chunk: number of columns computed at a time.
        max_bytes: raise an error if the result would be larger.
        progress: called with (columns done, columns in all) after each chunk.

    Returns:
        [n, n]; column j is the product with the j-th unit vector. Symmetric up to rounding.

    Raises:
        TypeError: chunk is not an integer.
        ValueError: the result would be larger than ``max_bytes``, or chunk is below 1.
    """
    at_least("chunk", chunk, 1, "it is the number of products computed at a time")
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
