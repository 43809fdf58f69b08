"""Spectra from matrix-vector products: stochastic Lanczos quadrature, extreme eigenvalues, distances of spectra."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from . import symmetry
from .checks import at_least, finite
from .linear import LinearMap, as_scipy
from .results import Eigenpairs, SpectralDensity, positive_sigma

BASIS_BYTES = 2**30
"""Largest size of the Lanczos vectors that ``slq`` keeps at a time, unless a single probe needs more."""
KEPT = 0.7
"""A vector that keeps this share of its norm while it is made orthogonal need not be made so again."""
MOST_PASSES = 3


def slq(
    operator: LinearMap,
    steps: int = 100,
    probes: int = 10,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SpectralDensity:
    """Estimate an operator's spectral density by stochastic Lanczos quadrature with full reorthogonalisation.

    Every probe is a random sign vector. ``steps`` Lanczos steps from it give a quadrature of its spectral measure. The
    mean over probes estimates the density of eigenvalues (Ghorbani et al., arXiv 1901.10159). All probes advance
    together, with one block product per step. Recurrences run in float64 for every dtype of the operator. Each new
    vector is orthogonalised twice against all earlier ones, so no eigenvalue appears twice.

    Args:
        operator: symmetric, order n.
        steps: Lanczos steps; more than n steps give nothing new.
        probes: random start vectors, >= 2 for standard errors.
        seed: seed of the start vectors.
        progress: called with (steps done, steps in all).

    Returns:
        ``SpectralDensity``. If a probe's Krylov space ends early, its remaining nodes have weight 0.

    Raises:
        TypeError: steps or probes is not an integer.
        ValueError: steps or probes is below 1, or the products are not finite or show that the operator is not
            symmetric.
    """
    at_least("steps", steps, 1)
    at_least("probes", probes, 1)
    n = operator.shape[0]
    requested_steps, steps = steps, min(steps, n)
    generator = torch.Generator().manual_seed(seed)
    together = max(1, min(probes, BASIS_BYTES // (steps * n * operator.dtype.itemsize)))
    passes = -(-probes // together)
    nodes, weights = [], []
    for number in range(passes):
        count = min(together, probes - number * together)
        start = torch.stack([_signs(n, generator) for _ in range(count)]).to(operator.device)

        def report(done: int, number: int = number) -> None:
            if progress is not None:
                progress(number * steps + done, passes * steps)

        for alpha, beta in zip(*_tridiagonal(operator, start, steps, report), strict=True):
            found = _quadrature(alpha.cpu(), beta.cpu())
            nodes.append(found[0])
            weights.append(found[1])
    pad = (0, requested_steps - steps)
    return SpectralDensity(
        torch.nn.functional.pad(torch.stack(nodes), pad), torch.nn.functional.pad(torch.stack(weights), pad), n
    )


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def _tridiagonal(
    operator: LinearMap, start: Tensor, steps: int, report: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """Run Lanczos from several vectors at once.

    Coefficients and the newest vector are float64; the basis has the operator's dtype, because the operator sees no
    more of it.

    Args:
        operator: symmetric, order n.
        start: signs, [probes, n].
        steps: number of steps, at most n.
        report: called with the number of steps done.

    Returns:
        The diagonals and the elements beside them, float64 [probes, steps] each; an element beside the diagonal that is
        0 ends a probe's matrix.
    """
    probes, n = start.shape
    basis = torch.zeros(probes, steps, n, dtype=operator.dtype, device=operator.device)
    alpha, beta = (torch.zeros(probes, steps, dtype=torch.float64, device=operator.device) for _ in range(2))
    scale = torch.zeros(probes, dtype=torch.float64, device=operator.device)
    # A remainder of the size of rounding means an invariant subspace. The probe's vectors are zero from then on.
    rounding = 1e-10 if operator.dtype == torch.float64 else 1e-5
    basis[:, 0] = start
    basis[:, 0] /= math.sqrt(n)
    newest = torch.empty(n, dtype=torch.float64, device=operator.device)
    for step in range(steps):
        products = operator.matmat(basis[:, step].T).T
        if step == 0:
            symmetry.require(start.T, products.T * math.sqrt(n), operator.dtype)
        for p in range(probes):
            earlier = basis[p, : step + 1]
            alpha[p, step] = newest.copy_(products[p]) @ earlier[step].to(torch.float64)
            if not bool(alpha[p, step].isfinite()):
                finite("a product of the operator", products)
            newest.sub_(earlier[step], alpha=float(alpha[p, step]))
            if step:
                newest.sub_(earlier[step - 1], alpha=float(beta[p, step - 1]))
            size = _make_orthogonal(newest, earlier)
            scale[p] = max(float(scale[p]), abs(float(alpha[p, step])) + size)
            if size > rounding * float(scale[p]):
                beta[p, step] = size
                if step + 1 < steps:
                    basis[p, step + 1] = newest.div_(size)
        report(step + 1)
    return alpha, beta


def _make_orthogonal(vector: Tensor, basis: Tensor) -> float:
    """Make a vector, float64 [n], orthogonal to the rows of ``basis`` in place; return its norm.

    One pass suffices unless it takes much of the vector's norm (Daniel et al. 1976).
    """
    size, part = float(vector.norm()), torch.empty(len(vector), dtype=basis.dtype, device=basis.device)
    for _ in range(MOST_PASSES):
        before = size
        torch.mv(basis.T, basis @ part.copy_(vector), out=part)
        size = float(vector.sub_(part).norm())
        if size >= KEPT * before:
            break
    return size


def _quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of one probe's tridiagonal matrix; entries after its end have weight 0."""
    ended = (beta[:-1] == 0).nonzero()
    length = int(ended[0]) + 1 if len(ended) else len(alpha)
    tridiagonal = torch.diag(alpha[:length])
    if length > 1:
        off = beta[: length - 1]
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    nodes, weights = torch.zeros_like(alpha), torch.zeros_like(alpha)
    nodes[:length], weights[:length] = values, vectors[0].square()
    return nodes, weights


def eigenpairs(operator: LinearMap, k: int = 1, which: str = "LM", seed: int = 0) -> Eigenpairs:
    """Compute k eigenvalues from one end of the spectrum and their eigenvectors.

    Args:
        operator: symmetric, order n.
        k: number of eigenvalues, below n.
        which: the end of the spectrum, as in scipy's ``eigsh``: "LM", "LA", "SA", ...
        seed: seed of the start vector.

    Returns:
        ``Eigenpairs`` with the residual of every pair.

    Raises:
        TypeError: k is not an integer.
        ValueError: k is below 1, or k >= n; for all n use ``torch.linalg.eigh(dense(operator))``.
        scipy.sparse.linalg.ArpackNoConvergence: ARPACK's iterations did not suffice.
    """
    at_least("k", k, 1)
    if k >= operator.shape[0]:
        raise ValueError(
            f"k={k} must be below the operator's order {operator.shape[0]}; for all eigenvalues use "
            "torch.linalg.eigvalsh(dense(operator))"
        )
    counted, products = as_scipy(operator), 0

    def matvec(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        out: np.ndarray = counted.matvec(vector)
        return out

    start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counting = scipy.sparse.linalg.LinearOperator(operator.shape, matvec, dtype=np.dtype(np.float64))
    values, vectors = scipy.sparse.linalg.eigsh(counting, k=k, which=which, v0=start.numpy())
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    residuals = np.linalg.norm(counted.matmat(vectors) - vectors * values, axis=0)
    return Eigenpairs(
        torch.from_numpy(np.ascontiguousarray(values)),
        torch.from_numpy(np.ascontiguousarray(vectors)),
        torch.from_numpy(residuals),
        products + k,
    )


def extreme_eigenvalues(operator: LinearMap, k: int = 1, which: str = "LM", seed: int = 0) -> Tensor:
    """Return the eigenvalues of ``eigenpairs``, in descending order, float64 [k]."""
    return eigenpairs(operator, k, which, seed).values


def js_distance(first: Tensor, second: Tensor, *, sigma: float = 0.2, points: int = 512) -> float:
    """Return the Jensen-Shannon distance between the densities of two sets of eigenvalues.

    Eigenvalues of different blocks differ by orders of magnitude. The densities are therefore compared on the axis
    asinh(x / s), which is linear near zero and logarithmic beyond; s is the geometric mean of the two median absolute
    eigenvalues. Gaussians of standard deviation ``sigma`` on that axis smooth the densities. The distance is that of
    arXiv 2402.16788; the axis is a choice of this project.

    Args:
        first: eigenvalues, any number of them.
        second: eigenvalues, any number of them.
        sigma: smoothing width on the asinh axis.
        points: number of grid points.

    Returns:
        The square root of the Jensen-Shannon divergence in bits, 0 (equal) to 1 (disjoint).

    Raises:
        TypeError: points is not an integer.
        ValueError: a set has no eigenvalues, or NaN or infinite ones; sigma is not positive; or points is below 2.
    """
    positive_sigma(sigma)
    at_least("points", points, 2, "a density needs a grid")
    for name, values in (("first", first), ("second", second)):
        if values.numel() == 0 or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{name} holds {values.numel()} eigenvalues; at least one is needed and all must be finite: leave that "
                "block out of the comparison"
            )
    first, second = first.flatten().to(torch.float64), second.flatten().to(torch.float64)
    typical = [max(float(x.abs().median()), 1e-3 * float(x.abs().max()), 1e-300) for x in (first, second)]
    warped = [torch.asinh(x / math.sqrt(typical[0] * typical[1])) for x in (first, second)]
    low = min(float(w.min()) for w in warped) - 4 * sigma
    high = max(float(w.max()) for w in warped) + 4 * sigma
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    p, q = (torch.exp(-0.5 * ((grid[:, None] - w) / sigma).square()).mean(1) for w in warped)
    p, q = p / p.sum(), q / q.sum()
    middle = 0.5 * (p + q)
    divergence = 0.5 * (_kl(p, middle) + _kl(q, middle))
    return math.sqrt(max(0.0, divergence))


def _kl(p: Tensor, q: Tensor) -> float:
    inside = p > 0
    return float((p[inside] * (p[inside] / q[inside]).log2()).sum())
