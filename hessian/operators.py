"""The Hessian of a mean loss as a linear operator over any subset of a model's parameters.

Algorithms need no more of an operator than ``LinearMap``: shape, dtype, device and products with blocks of vectors.
Any symmetric matrix can stand in for a model's Hessian (``MatrixOperator``), so each can be tested where the answer is
known.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checks

logger = logging.getLogger("hessian")
LINEARISE_AFTER = 128
"""Columns after which tracing the products pays (it costs about as much as that many of them)."""


class LinearMap(Protocol):
    """What the algorithms ask of a symmetric operator."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors it takes and gives."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """[n, k] -> [n, k]."""


class MatrixOperator:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; it must be square")
        self.matrix = matrix
        self.shape = (len(matrix), len(matrix))
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """[n, k] -> [n, k]."""
        return self.matrix @ vectors


class _LossModule(nn.Module):
    """loss(model, batch) as a forward pass, so that the model's parameters can be swapped by name."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Only attention kernels with second derivatives, for as long as it lasts."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class HessianOperator:
    """The Hessian of the mean loss over all examples of all batches.

    ``H @ v`` and ``H.matmat(V)`` are exact products (forward-over-reverse, Pearlmutter 1994, under ``vmap``); no matrix
    is formed. The model is read only: weights, buffers, ``.grad`` and ``requires_grad`` stay as they are. The Hessian
    is that of the weights at construction; leave the model alone while the operator is in use. torch's fused attention
    kernels have no second derivative, so the math kernel takes their place inside.

    After ``LINEARISE_AFTER`` columns each batch's product is traced once into a straight-line linear program (one
    gradient's intermediates are kept), which spares every later chunk the gradient itself and its dispatch.

    Args:
        model: the model, in eval mode if it has dropout or batch normalisation.
        loss: ``loss(model, batch)`` -> 0-dim tensor, the mean over the batch.
        params: name -> tensor (the model's own, or other values to take the Hessian at); None for all trainable ones.
            The vector order is this order, each tensor flattened row-major.
        batches: batches of one structure; they may differ in size.
        count: examples in a batch, which weight its mean; default: rows of its first tensor.
        chunk: vectors per pass in ``matmat``; small chunks stay in cache and bound memory.

    Raises:
        ValueError, TypeError: see ``hessian.checks``.
        RuntimeError: something in the model has no second derivative.

    Example:
        >>> H = HessianOperator(model, loss, dict(model.named_parameters()), batches)
        >>> H @ torch.ones(H.shape[0], dtype=H.dtype)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        params: dict[str, Tensor] | None = None,
        batches: Sequence[Any] | None = None,
        *,
        count: Callable[[Any], int] | None = None,
        chunk: int = 16,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        own = checks.own_parameters(model, params)
        checks.deterministic(model)
        self._batches = checks.usable_batches(batches)
        counts = [(count or checks.example_count)(batch) for batch in self._batches]
        if min(counts) <= 0:
            raise ValueError(f"count gave {counts}; every batch must hold at least one example")
        self._weights = [c / sum(counts) for c in counts]
        self._module = _LossModule(model, loss)
        self._theta = {name: tensor.detach().clone() for name, tensor in own.items()}
        self._buffers = {f"model.{name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._sizes = [tensor.numel() for tensor in own.values()]
        self._chunk = chunk
        self._forward_mode = True
        self._columns_asked = 0
        self._programs: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None
        first = next(iter(own.values()))
        self.dtype, self.device = first.dtype, first.device
        self.shape = (sum(self._sizes), sum(self._sizes))
        with _twice_differentiable(), torch.inference_mode(False), torch.enable_grad():
            with torch.no_grad():
                checks.mean_loss(lambda batch: self._value(self._theta, batch), self._batches)
            checks.dependence(self._reverse_gradients, list(own), self._batches)
            self._probe_second_derivative()

    @property
    def names(self) -> list[str]:
        """Parameter names, in vector order."""
        return list(self._theta)

    def _value(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        swapped = {f"model.{name}": tensor for name, tensor in theta.items()} | self._buffers
        return functional_call(self._module, swapped, (batch,), tie_weights=True)

    def _reverse_gradients(self, batch: Any, names: list[str]) -> dict[str, Tensor | None]:
        """Plain gradients, None where the loss does not depend on a parameter."""
        theta = {name: tensor.clone().requires_grad_(name in names) for name, tensor in self._theta.items()}
        value = self._value(theta, batch)
        if not value.requires_grad:
            return dict.fromkeys(names)
        found = torch.autograd.grad(value, [theta[name] for name in names], allow_unused=True)
        return dict(zip(names, found, strict=True))

    def _probe_second_derivative(self) -> None:
        """One product, to choose forward mode where it exists and to fail now rather than an hour from now."""
        tangent = {name: torch.ones_like(tensor) for name, tensor in self._theta.items()}
        try:
            self._product(tangent, self._batches[0])
        except (RuntimeError, NotImplementedError) as forward_error:
            self._forward_mode = False
            try:
                self._product(tangent, self._batches[0])
                logger.info("no forward-mode derivative here (%s); using reverse over reverse", forward_error)
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(
                    f"the loss has no second derivative: {error}. An operation in the model cannot be differentiated "
                    "twice; replace it (a custom autograd function, flex or flash attention) by plain torch "
                    "operations, for attention by torch.nn.functional.scaled_dot_product_attention"
                ) from error

    def _product(self, tangent: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Hessian-vector product of one batch's loss."""
        gradient = grad(self._value)

        def gradient_at(theta: dict[str, Tensor]) -> dict[str, Tensor]:
            return gradient(theta, batch)

        if self._forward_mode:
            product = jvp(gradient_at, (self._theta,), (tangent,))[1]
        else:
            product = vjp(gradient_at, self._theta)[1](tangent)[0]
        out: dict[str, Tensor] = product
        return out

    def _unflatten(self, columns: Tensor) -> dict[str, Tensor]:
        """[k, n] -> name -> [k, *shape]."""
        pieces = columns.split(self._sizes, dim=1)
        return {n: p.reshape(-1, *t.shape) for (n, t), p in zip(self._theta.items(), pieces, strict=True)}

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with a block of vectors.

        Args:
            vectors: [n, k], the operator's dtype and device.

        Returns:
            [n, k].

        Raises:
            ValueError: another number of rows.
        """
        if vectors.dim() != 2 or len(vectors) != self.shape[0]:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}; this operator takes [{self.shape[0]}, k]")
        columns = vectors.to(self.device, self.dtype).T
        out = torch.empty_like(columns, memory_format=torch.contiguous_format)
        with torch.no_grad(), _twice_differentiable():
            for start in range(0, len(columns), self._chunk):
                chunk = columns[start : start + self._chunk]
                self._columns_asked += len(chunk)
                if self._programs is None and self._forward_mode and self._columns_asked > LINEARISE_AFTER:
                    self._programs = self._linearise()
                total = torch.zeros_like(chunk, memory_format=torch.contiguous_format)
                for i, weight in enumerate(self._weights):
                    product = self._chunk_product(self._unflatten(chunk), i)
                    total.add_(torch.cat([product[n].flatten(1) for n in self._theta], dim=1), alpha=weight)
                out[start : start + self._chunk] = total
        return out.T

    def _linearise(self) -> list[Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
        """One traced product per batch, each checked against the untraced one; empty where tracing does not work."""
        probe = {
            name: torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape)
            for name, t in self._theta.items()
        }
        programs = []
        for batch in self._batches:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's tracer speaks of its own graph nodes
                    program = linearize(lambda theta, b=batch: grad(self._value)(theta, b), self._theta)[1]
                    traced, plain = program(probe), self._product(probe, batch)
            except Exception as error:  # whatever a tracer may stumble on, the plain product is right
                logger.info("products cannot be traced (%s: %s); going on without", type(error).__name__, error)
                return []
            scale = max(float(plain[name].abs().max()) for name in plain)
            if not all(float((traced[name] - plain[name]).abs().max()) <= 1e-5 * scale for name in plain):
                logger.warning("traced products differ from plain ones; going on without")
                return []
            programs.append(program)
        return programs

    def _chunk_product(self, tangents: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        """Products of a chunk of vectors with the Hessian of batch i."""
        batch = self._batches[i]
        program = self._programs[i] if self._programs else lambda tangent: self._product(tangent, batch)
        if len(next(iter(tangents.values()))) == 1:  # vmap over one vector is all overhead
            single = program({name: tensor[0] for name, tensor in tangents.items()})
            return {name: tensor.unsqueeze(0) for name, tensor in single.items()}
        out: dict[str, Tensor] = vmap(program)(tangents)
        return out

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self.matmat(vectors.unsqueeze(1)).squeeze(1)
        return self.matmat(vectors)

    def gradient(self) -> Tensor:
        """Gradient of the mean loss, [n]."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with torch.no_grad(), _twice_differentiable():
            for weight, batch in zip(self._weights, self._batches, strict=True):
                one = grad(self._value)(self._theta, batch)
                total.add_(torch.cat([one[name].flatten() for name in self._theta]), alpha=weight)
        return total

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A float64 scipy ``LinearOperator``, for ``scipy.sparse.linalg.eigsh`` and its like."""
        return as_scipy(self)


def as_scipy(operator: LinearMap) -> scipy.sparse.linalg.LinearOperator:
    """Any ``LinearMap`` as a float64 scipy ``LinearOperator``."""

    def matmat(vectors: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(np.ascontiguousarray(vectors.reshape(operator.shape[0], -1)))
        product = operator.matmat(block.to(operator.device, operator.dtype))
        out: np.ndarray = product.to("cpu", torch.float64).numpy()
        return out

    return scipy.sparse.linalg.LinearOperator(
        shape=operator.shape, dtype=np.dtype(np.float64), matmat=matmat, rmatmat=matmat,
        matvec=lambda v: matmat(v).reshape(-1), rmatvec=lambda v: matmat(v).reshape(-1),
    )  # fmt: skip
