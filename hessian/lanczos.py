"""Spectra from products alone: stochastic Lanczos quadrature, extreme eigenvalues, distances between spectra."""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy.sparse.linalg
import torch
from torch import Tensor

from .checks import at_least, finite
from .operators import LinearMap, as_scipy
from .results import SpectralDensity, positive_sigma


def slq(
    operator: LinearMap,
    steps: int = 100,
    probes: int = 10,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature with full reorthogonalisation.

    Every probe is a random sign vector; ``steps`` Lanczos steps on it give a quadrature of its spectral measure, whose
    mean over probes estimates the density of eigenvalues (Ghorbani et al., arXiv 1901.10159). Probes advance together,
    one block product per step. Recurrences are in float64 whatever the operator's dtype; each new vector is
    orthogonalised twice against all before it, so no eigenvalue appears twice.

    Args:
        operator: symmetric, order n.
        steps: Lanczos steps; beyond n there is nothing left to find.
        probes: random start vectors, >= 2 for standard errors.
        seed: of the start vectors.
        progress: called with (steps done, steps in all).

    Returns:
        ``SpectralDensity``. Where a probe's Krylov space ends early, its remaining nodes have weight 0.

    Raises:
        TypeError: steps or probes that are no integers.
        ValueError: steps or probes < 1, or products with NaN or infinite entries.
    """
    at_least("steps", steps, 1)
    at_least("probes", probes, 1)
    n = operator.shape[0]
    asked, steps = steps, min(steps, n)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n, probes), generator=generator).mul_(2).sub_(1)
    current = (signs.to(torch.float64) / math.sqrt(n)).to(operator.device)
    basis = torch.zeros(steps, n, probes, dtype=torch.float64, device=operator.device)
    alpha = torch.zeros(steps, probes, dtype=torch.float64, device=operator.device)
    beta = torch.zeros(steps, probes, dtype=torch.float64, device=operator.device)
    scale = torch.zeros(probes, dtype=torch.float64, device=operator.device)
    for step in range(steps):
        basis[step] = current
        product = operator.matmat(current.to(operator.dtype)).to(torch.float64)
        finite("a product of the operator", product)
        alpha[step] = (product * current).sum(0)
        known = basis[: step + 1]
        for _ in range(2):
            product = product - torch.einsum("snp,sp->np", known, torch.einsum("snp,np->sp", known, product))
        beta[step] = product.norm(dim=0)
        scale = torch.maximum(scale, alpha[step].abs() + beta[step])
        # An invariant subspace is reached when what is left is rounding; the probe then rests at zero.
        alive = beta[step] > 1e-10 * scale if operator.dtype == torch.float64 else beta[step] > 1e-5 * scale
        beta[step] = torch.where(alive, beta[step], 0.0)
        current = torch.where(alive, product / beta[step].clamp_min(1e-300), 0.0)
        if progress is not None:
            progress(step + 1, steps)
    nodes, weights = zip(*(_quadrature(alpha[:, p].cpu(), beta[:, p].cpu()) for p in range(probes)), strict=True)
    pad = (0, asked - steps)
    return SpectralDensity(
        torch.nn.functional.pad(torch.stack(nodes), pad), torch.nn.functional.pad(torch.stack(weights), pad), n
    )


def _quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one probe's tridiagonal matrix, padded with weight 0 behind its end."""
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


def extreme_eigenvalues(operator: LinearMap, k: int = 1, which: str = "LM", seed: int = 0) -> Tensor:
    """The k eigenvalues scipy's ``eigsh`` calls ``which`` ("LM", "LA", "SA", ...), in descending order, float64 [k].

    Raises:
        TypeError: k is no integer.
        ValueError: k < 1, or k >= n, where Lanczos has no room: take ``torch.linalg.eigvalsh(dense(operator))``.
    """
    at_least("k", k, 1)
    if k >= operator.shape[0]:
        raise ValueError(
            f"k={k} must be below the operator's order {operator.shape[0]}; for all eigenvalues take "
            "torch.linalg.eigvalsh(dense(operator))"
        )
    start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = scipy.sparse.linalg.eigsh(
        as_scipy(operator), k=k, which=which, v0=start.numpy(), return_eigenvectors=False
    )
    return torch.from_numpy(values).sort(descending=True).values


def js_distance(first: Tensor, second: Tensor, *, sigma: float = 0.2, points: int = 512) -> float:
    """Jensen-Shannon distance between the densities of two sets of eigenvalues.

    Blocks' eigenvalues differ by orders of magnitude, so densities are compared on the axis asinh(x / s), linear near
    zero and logarithmic beyond, with s the geometric mean of the two median absolute eigenvalues; Gaussians of standard
    deviation ``sigma`` on that axis smooth them (the measure of arXiv 2402.16788, on a scale of our choice).

    Args:
        first: eigenvalues, any number.
        second: eigenvalues, any number.
        sigma: smoothing width on the asinh axis.
        points: grid size.

    Returns:
        The square root of the Jensen-Shannon divergence in bits, 0 (equal) to 1 (disjoint).

    Raises:
        TypeError: points that are no integer.
        ValueError: no eigenvalues, or NaN or infinite ones; sigma that is not positive, fewer than two points.
    """
    positive_sigma(sigma)
    at_least("points", points, 2, "a density needs a grid")
    for name, values in (("first", first), ("second", second)):
        if values.numel() == 0 or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{name} holds {values.numel()} eigenvalues; at least one is needed and all must be finite: leave that "
                "block out"
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
