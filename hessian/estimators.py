"""Traces and diagonals of an operator from random probes, with standard errors.

All probes are vectors of independent random signs. Sums run in float64 for every dtype of the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import symmetry
from .checks import at_least, finite
from .linear import LinearMap
from .results import Estimate


def trace(operator: LinearMap, products: int = 60, method: str = "hutch++", seed: int = 0) -> Estimate:
    """Estimate the trace of a symmetric operator.

    Args:
        operator: symmetric, order n.
        products: number of products that may be used; with n or more, the result is exact.
        method: "hutchinson", the mean of z^T A z over probes (Hutchinson 1990). "hutch++", exact on the range of a
            sketch and Hutchinson's estimate on the rest (Meyer et al., arXiv 2010.09649). "xtrace", which uses each
            probe once for the sketch and once for the rest (Epperly, Tropp and Webber, arXiv 2301.07825). The last two
            have much smaller errors if few eigenvalues carry most of the trace, as in Hessians, and larger ones if the
            spectrum is flat. How often their intervals cover the trace is measured in docs/hessian.md.
        seed: seed of the probes.

    Returns:
        ``Estimate`` of the trace.

    Raises:
        TypeError: products is not an integer.
        ValueError: method is unknown, products is too small for the method's standard error, or the products are not
            finite or show that the operator is not symmetric.
    """
    methods: dict[str, tuple[int, Callable[[LinearMap, int, int], Estimate]]] = {
        "hutchinson": (2, _hutchinson), "hutch++": (6, _hutch_plus_plus), "xtrace": (4, _xtrace),
    }  # fmt: skip
    function = _chosen(methods, method, products)
    if products >= operator.shape[0]:
        exact = _exact_diagonal(operator)
        return Estimate(exact.value.sum(), exact.stderr.sum(), exact.samples, exact.products)
    return function(operator, products, seed)


def diagonal(operator: LinearMap, products: int = 60, method: str = "xdiag", seed: int = 0) -> Estimate:
    """Estimate the diagonal of a symmetric operator.

    Args:
        operator: symmetric, order n.
        products: number of products that may be used; with n or more, the result is exact.
        method: "hutchinson", the mean of z * (A z) over probes (Bekas et al. 2007), or "xdiag", which is exact on the
            range of a sketch (Epperly, Tropp and Webber, arXiv 2301.07825).
        seed: seed of the probes.

    Returns:
        ``Estimate`` of the diagonal, [n].

    Raises:
        TypeError: products is not an integer.
        ValueError: method is unknown, products is too small for the method's standard error, or the products are not
            finite or show that the operator is not symmetric.
    """
    methods: dict[str, tuple[int, Callable[[LinearMap, int, int], Estimate]]] = {
        "hutchinson": (2, _diagonal_by_hutchinson), "xdiag": (4, _xdiag),
    }  # fmt: skip
    function = _chosen(methods, method, products)
    return _exact_diagonal(operator) if products >= operator.shape[0] else function(operator, products, seed)


def _exact_diagonal(operator: LinearMap) -> Estimate:
    n = operator.shape[0]
    value = _multiply(operator, torch.eye(n, dtype=torch.float64)).diagonal().clone()
    return Estimate(value, torch.zeros_like(value), n, n)


def _chosen(
    methods: dict[str, tuple[int, Callable[[LinearMap, int, int], Estimate]]], method: str, products: int
) -> Callable[[LinearMap, int, int], Estimate]:
    if method not in methods:
        raise ValueError(f"method={method!r} is unknown; choose from {sorted(methods)}")
    least, function = methods[method]
    at_least("products", products, least, f"the standard error of method={method!r} needs them")
    return function


def _signs(n: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n, count), generator=generator).mul_(2).sub_(1).to(torch.float64)


def _multiply(operator: LinearMap, vectors: Tensor) -> Tensor:
    """Return the products in float64, on the CPU."""
    out = operator.matmat(vectors.to(operator.device, operator.dtype))
    finite("a product of the operator", out)
    return out.to("cpu", torch.float64)


def _multiply_signs(operator: LinearMap, vectors: Tensor) -> Tensor:
    """Return the products with vectors of signs, which also show whether the operator is symmetric."""
    out = _multiply(operator, vectors)
    symmetry.require(vectors, out, operator.dtype)
    return out


def _mean(samples: Tensor, products: int) -> Estimate:
    """Return the mean over the first axis with its standard error."""
    count = len(samples)
    return Estimate(samples.mean(0), samples.std(0) / math.sqrt(count), count, products)


def _hutchinson(operator: LinearMap, products: int, seed: int) -> Estimate:
    z = _signs(operator.shape[0], products, seed)
    return _mean((z * _multiply_signs(operator, z)).sum(0), products)


def _diagonal_by_hutchinson(operator: LinearMap, products: int, seed: int) -> Estimate:
    z = _signs(operator.shape[0], products, seed)
    return _mean((z * _multiply_signs(operator, z)).T, products)


def _hutch_plus_plus(operator: LinearMap, products: int, seed: int) -> Estimate:
    n, third = operator.shape[0], products // 3
    probes = _signs(n, min(third, n) + products - 2 * third, seed)
    sketch, rest = probes[:, : min(third, n)], probes[:, min(third, n) :]
    basis = torch.linalg.qr(_multiply_signs(operator, sketch)).Q
    inside = float((basis * _multiply(operator, basis)).sum())
    rest = rest - basis @ (basis.T @ rest)
    estimate = _mean((rest * _multiply(operator, rest)).sum(0), 2 * sketch.shape[1] + rest.shape[1])
    return Estimate(inside + estimate.value, estimate.stderr, estimate.samples, estimate.products)


class _Sketch:
    """Probes, a basis of A times the probes, and what is left of both without one or two of the probes; k probes.

    Leaving probe i out of the sketch removes one direction s_i, column i of ``left_out``, from the basis: the
    projection on the others is Q (I - s_i s_i^T) Q^T. A probe whose product the others span removes nothing: s_i = 0.
    """

    def __init__(self, operator: LinearMap, products: int, seed: int) -> None:
        n = operator.shape[0]
        self.probes = _signs(n, min(products // 2, n), seed)  # [n, k]
        self.Y = _multiply_signs(operator, self.probes)
        U, S, Vh = torch.linalg.svd(self.Y, full_matrices=False)
        rank = int((1e-12 * len(U) * S.max() < S).sum()) if bool(S.any()) else 0
        self.Q, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        self.Z = _multiply(operator, self.Q) if rank else torch.zeros_like(self.Q)
        needed = Vh.square().sum(0) > 1 - 1e-9
        inverse = torch.where(needed, Vh / S[:, None], 0.0)
        self.left_out = inverse / inverse.norm(dim=0).clamp_min(1e-300)  # [rank, k]
        self.products = self.probes.shape[1] + rank

    def removed(self, also: int | None) -> list[Tensor]:
        """Return orthonormal directions that go with each probe, and with probe ``also``; [rank, k] each."""
        if also is None:
            return [self.left_out]
        first = self.left_out[:, also : also + 1].expand_as(self.left_out)
        second = self.left_out - first * (first * self.left_out).sum(0)
        return [first, second / second.norm(dim=0).clamp_min(1e-12)]

    def estimate(self, each: Callable[[list[Tensor]], Tensor]) -> Estimate:
        """Return the mean over probes, with a standard error from the jackknife and the spread.

        The estimates of single probes depend on each other through the basis. Write the mean as a sum of terms that
        belong to sets of probes (Hoeffding's decomposition). The variance of terms of c probes is counted c times by
        the jackknife (Efron and Stein 1981), which leaves a probe out of everything, and about 1/c times by the spread
        of the single estimates, because each is unbiased given the others. The geometric mean of the two is exact if
        one c has all the variance, and too large otherwise. The jackknife is also of an estimate with a probe less,
        which is much worse where the spectrum falls fast. Therefore no more is taken than the spread of terms of pairs
        allows: twice the spread, with k probes 2 (k - 1) / (k - 2) times.

        Args:
            each: removed directions -> the estimate by every probe, [k, ...].
        """
        k = self.probes.shape[1]
        single = each(self.removed(None))
        without = []
        for i in range(k):
            samples = each(self.removed(i))
            without.append((samples.sum(0) - samples[i]) / (k - 1))
        jackknife = torch.stack(without).var(0) * (k - 1) ** 2 / k
        spread = single.var(0) / k
        variance = (jackknife * spread).sqrt()
        if k > 2:
            variance = torch.minimum(variance, 2 * (k - 1) / (k - 2) * spread)
        return Estimate(single.mean(0), variance.sqrt(), k, self.products)


def _without(vectors: Tensor, directions: list[Tensor]) -> Tensor:
    """Remove orthonormal directions, given for each column, from the columns."""
    for direction in directions:
        vectors = vectors - direction * (direction * vectors).sum(0)
    return vectors


def _xtrace(operator: LinearMap, products: int, seed: int) -> Estimate:
    s = _Sketch(operator, products, seed)
    H, W, C = s.Q.T @ s.Z, s.Q.T @ s.probes, s.Z.T @ s.probes
    plain = (s.probes * s.Y).sum(0)

    def each(removed: list[Tensor]) -> Tensor:
        inside = H.trace() - sum((d * (H @ d)).sum(0) for d in removed)
        kept = _without(W, removed)  # the probe's part in the basis; the rest x of the probe gives x^T A x
        return inside + plain - 2 * (kept * C).sum(0) + (kept * (H @ kept)).sum(0)

    return s.estimate(each)


def _xdiag(operator: LinearMap, products: int, seed: int) -> Estimate:
    s = _Sketch(operator, products, seed)
    T, whole = s.Q.T @ s.Y, (s.Q * s.Z).sum(1, keepdim=True)

    def each(removed: list[Tensor]) -> Tensor:
        inside = whole - sum((s.Q @ d) * (s.Z @ d) for d in removed)
        return (inside + s.probes * (s.Y - s.Q @ _without(T, removed))).T

    return s.estimate(each)
