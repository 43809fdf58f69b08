"""PyHessian 0.1 as a cross-check of eigenvalues, trace and spectrum.

This file works around PyHessian's limits: it needs ``model(inputs)`` and a criterion, defaults to CUDA, has no argument
for a seed or a dtype, leaves gradients with graphs on the model, and calls ``torch.eig``, which torch has removed.
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
    """PyHessian's results for the Hessian over all trainable parameters.

    Attributes:
        eigenvalues: [k] eigenvalues of largest magnitude, by power iteration, in PyHessian's order.
        trace: Hutchinson's estimate of the trace.
        trace_stderr: standard error of ``trace`` over probes.
        nodes: [probes, steps] Ritz values of PyHessian's Lanczos quadrature.
        weights: [probes, steps] weights of the nodes.
    """

    eigenvalues: Tensor
    trace: float
    trace_stderr: float
    nodes: Tensor
    weights: Tensor


class _LossModel(nn.Module):
    """A model whose output is the loss, because PyHessian expects a model and a separate criterion."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.loss = loss

    def forward(self, batch: _Batch) -> Tensor:
        return self.loss(self.inner, batch.content)


class _Batch:
    """A batch of any structure, with the two methods that PyHessian calls on inputs and targets."""

    def __init__(self, content: Any, share: float = 0.0) -> None:
        self.content = content
        self.share = share

    def size(self, _: int) -> float:
        return self.share

    def to(self, _: str) -> _Batch:
        return self


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """Return what the removed ``torch.eig`` returned for a symmetric matrix: values [n, 2], vectors [n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@contextlib.contextmanager
def _pyhessian_settings(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Set the seed, the default dtype and ``torch.eig`` for PyHessian, and restore all of them at the end."""
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
    """Run PyHessian on the Hessian of the mean loss over all batches.

    Args:
        model: the model; PyHessian runs on a copy.
        loss: ``loss(model, batch)`` -> 0-dim tensor, the mean over the batch.
        batches: batches of one structure; they may differ in size.
        top: number of eigenvalues of largest magnitude.
        iterations: power iterations for each eigenvalue.
        trace_probes: number of Hutchinson probes; there is no early stop.
        steps: Lanczos steps.
        probes: number of Lanczos start vectors.
        seed: seed of all random numbers.
        count: function of a batch that returns what its loss is a mean over. Without it, the batches must have weights
            that follow from their tensors alone.

    Raises:
        ImportError: PyHessian is not installed.
        ValueError: count is None and the weights of the batches are ambiguous.
    """
    try:
        from pyhessian import hessian as PyHessian
    except ImportError as error:
        raise ImportError("pyhessian is not installed; pip install --no-deps pyhessian==0.1") from error
    wrapped = _LossModel(copy.deepcopy(model), loss)
    dtype = next(wrapped.parameters()).dtype
    batches = usable_batches(batches)
    weights = plain(batches) if count is None else counted(count, batches)
    loader = [(_Batch(batch, share), _Batch(None)) for batch, share in zip(batches, weights, strict=True)]
    with _pyhessian_settings(dtype, seed):
        runner = PyHessian(wrapped, lambda value, _: value, dataloader=loader, cuda=False)
        values, _ = runner.eigenvalues(maxIter=iterations, tol=1e-12, top_n=top)
        samples = torch.tensor(runner.trace(maxIter=trace_probes, tol=0.0), dtype=torch.float64)
        nodes, weights = runner.density(iter=steps, n_v=probes)
    return PyHessianAnswer(
        eigenvalues=torch.tensor(values, dtype=torch.float64),
        trace=samples.mean().item(),
        trace_stderr=(samples.std() / len(samples) ** 0.5).item(),
        nodes=torch.tensor(nodes, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )
