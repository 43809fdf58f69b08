"""A symmetric linear operator, the only thing that the algorithms of this package know of what they measure.

Algorithms use only ``LinearMap``: shape, dtype, device and products with blocks of vectors. ``MatrixOperator`` wraps
any symmetric matrix as such an operator, so every algorithm can be tested on a matrix whose answer is known.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from . import checks, symmetry


class LinearMap(Protocol):
    """The interface of a symmetric operator that the algorithms use."""

    @property
    def shape(self) -> tuple[int, int]:
        """Order of the operator, as (n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors and of the products."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors and of the products."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors, [n, k] -> [n, k]."""


class MatrixOperator:
    """A symmetric matrix as an operator.

    Args:
        matrix: [n, n], symmetric up to rounding.

    Raises:
        TypeError: the matrix is not a floating-point tensor.
        ValueError: the matrix is not square, is empty, is not finite, or is not symmetric.
    """

    def __init__(self, matrix: Tensor) -> None:
        checks.square(matrix)
        off, allowed = float((matrix - matrix.T).abs().max()), symmetry.tolerance(matrix.dtype)
        if off > allowed * float(matrix.abs().max()):
            raise ValueError(
                f"matrix is not symmetric: it differs from its transpose by {off:.2g}, but every algorithm here needs "
                "a symmetric matrix: pass (matrix + matrix.T) / 2 if you mean its symmetric part"
            )
        self.matrix = matrix
        self.shape = (len(matrix), len(matrix))
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors, [n, k] -> [n, k]."""
        return self.matrix @ vectors


class PrincipalBlock:
    """The block of an operator between some of its parameters: a product takes one product with the operator.

    Args:
        operator: symmetric, order n.
        index: int64 [m], which parameters; none occurs twice.

    Raises:
        ValueError: index is empty, leaves 0 ... n - 1, or has a number twice.
    """

    def __init__(self, operator: LinearMap, index: Tensor) -> None:
        n, m = operator.shape[0], len(index)
        if not m or int(index.min()) < 0 or int(index.max()) >= n or len(torch.unique(index)) < m:
            raise ValueError(f"index has {m} entries; it must hold different numbers from 0 to {n - 1}, at least one")
        self._operator, self._index = operator, index.to(operator.device)
        self.shape = (m, m)
        self.dtype, self.device = operator.dtype, operator.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors, [m, k] -> [m, k]."""
        whole = torch.zeros(self._operator.shape[0], vectors.shape[1], dtype=self.dtype, device=self.device)
        whole[self._index] = vectors.to(self.device, self.dtype)
        return self._operator.matmat(whole)[self._index]


def as_scipy(operator: LinearMap) -> scipy.sparse.linalg.LinearOperator:
    """Wrap any ``LinearMap`` as a float64 scipy ``LinearOperator``."""

    def matmat(vectors: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(np.ascontiguousarray(vectors.reshape(operator.shape[0], -1)))
        product = operator.matmat(block.to(operator.device, operator.dtype))
        out: np.ndarray = product.to("cpu", torch.float64).numpy()
        return out

    return scipy.sparse.linalg.LinearOperator(
        shape=operator.shape,
        dtype=np.dtype(np.float64),
        matmat=matmat,
        rmatmat=matmat,
        matvec=lambda v: matmat(v).reshape(-1),
        rmatvec=lambda v: matmat(v).reshape(-1),
    )
