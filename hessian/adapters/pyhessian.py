"""PyHessian 0.1 as a cross-check of eigenvalues, trace and spectrum.

Its faults are worked around here and nowhere else: it wants ``model(inputs)`` and a criterion, defaults to CUDA, knows
no seed and no dtype, leaves gradients with graphs on the model, and calls ``torch.eig``, which raises nowadays.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import usable_batches
from ..weights import counted, plain


@dataclass(frozen=True)
class PyHessianAnswer:
    """What PyHessian says of a Hessian over all trainable parameters.

    Attributes:
        eigenvalues: [k] of largest magnitude, by power iteration, in the order found.
        trace: Hutchinson's estimate.
        trace_stderr: its standard error over probes.
        nodes: [probes, steps] Ritz values of its Lanczos quadrature.
        weights: [probes, steps] their weights.
    """

    eigenvalues: Tensor
    trace: float
    trace_stderr: float
    nodes: Tensor
    weights: Tensor


class _Whole(nn.Module):
    """The loss as a model, since PyHessian splits the two."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.loss = loss

    def forward(self, batch: _Batch) -> Tensor:
        return self.loss(self.inner, batch.content)


class _Batch:
    """A batch of any structure, with the two methods PyHessian calls on inputs and targets."""

    def __init__(self, content: Any, share: float = 0.0) -> None:
        self.content = content
        self.share = share

    def size(self, _: int) -> float:
        return self.share

    def to(self, _: str) -> _Batch:
        return self


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """What the removed ``torch.eig`` gave for a symmetric matrix: values [n, 2], vectors [n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@contextlib.contextmanager
def _its_world(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Seed, default dtype and ``torch.eig`` as PyHessian needs them; all put back afterwards."""
    default = torch.get_default_dtype()
    patched = mock.patch.object(torch, "eig", _eig, create=True)
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), patched:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def pyhessian_answer(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    top: int = 1,
    iterations: int = 300,
    trace_probes: int = 100,
    steps: int = 20,
    probes: int = 4,
    seed: int = 0,
    count: Callable[[Any], float] | None = None,
) -> PyHessianAnswer:
    """Ask PyHessian about the Hessian of the mean loss over all batches.

    Args:
        model: the model; a copy is worked on.
        loss: as ``HessianOperator``.
        batches: as ``HessianOperator``.
        top: eigenvalues of largest magnitude.
        iterations: power iterations for each.
        trace_probes: Hutchinson probes, all used.
        steps: Lanczos steps.
        probes: Lanczos start vectors.
        seed: of everything random.
        count: as ``HessianOperator``; without it, batches whose weights are in doubt are refused.

    Raises:
        ImportError: PyHessian is not installed.
    """
    try:
        from pyhessian import hessian as PyHessian
    except ImportError as error:
        raise ImportError("pyhessian is not installed; pip install --no-deps pyhessian==0.1") from error
    wrapped = _Whole(copy.deepcopy(model), loss)
    dtype = next(wrapped.parameters()).dtype
    batches = usable_batches(batches)
    weights = plain(batches) if count is None else counted(count, batches)
    loader = [(_Batch(batch, share), _Batch(None)) for batch, share in zip(batches, weights, strict=True)]
    with _its_world(dtype, seed):
        asked = PyHessian(wrapped, lambda value, _: value, dataloader=loader, cuda=False)
        values, _ = asked.eigenvalues(maxIter=iterations, tol=1e-12, top_n=top)
        samples = torch.tensor(asked.trace(maxIter=trace_probes, tol=0.0), dtype=torch.float64)
        nodes, weights = asked.density(iter=steps, n_v=probes)
    return PyHessianAnswer(
        eigenvalues=torch.tensor(values, dtype=torch.float64),
        trace=samples.mean().item(),
        trace_stderr=(samples.std() / len(samples) ** 0.5).item(),
        nodes=torch.tensor(nodes, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )
