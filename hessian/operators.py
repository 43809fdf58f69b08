"""The Hessian of a mean loss as a linear operator over any subset of a model's parameters.

Algorithms need no more of an operator than ``LinearMap``: shape, dtype, device and products with blocks of vectors.
Any symmetric matrix can stand in for a model's Hessian (``MatrixOperator``), so each can be tested where the answer is
known.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap

from . import checks, symmetry
from .second_order import twice_differentiable
from .weights import Weighing, counted

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
    """A symmetric matrix as an operator.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not square, empty, not finite or not symmetric.
    """

    def __init__(self, matrix: Tensor) -> None:
        checks.square(matrix)
        off, allowed = float((matrix - matrix.T).abs().max()), symmetry.tolerance(matrix.dtype)
        if off > allowed * float(matrix.abs().max()):
            raise ValueError(
                f"matrix is not symmetric: it differs from its transpose by {off:.2g}; every algorithm here takes it "
                "to be: pass (matrix + matrix.T) / 2 if that is what is meant"
            )
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


class HessianOperator:
    """The Hessian of the mean loss over all examples of all batches.

    ``H @ v`` and ``H.matmat(V)`` are exact products (forward-over-reverse, Pearlmutter 1994, under ``vmap``); no matrix
    is formed. The model is read only: weights, buffers, ``.grad`` and ``requires_grad`` stay as they are. The Hessian
    is that of the weights at construction; leave the model alone while the operator is in use. torch's fused attention
    kernels have no second derivative, so the math kernel takes their place inside; so do plain operations for
    ``mse_loss``, ``huber_loss`` and weight normalisation, whose second derivatives torch lacks or gets wrong.

    Construction costs two products per batch, which show whether the Hessian is symmetric, a few forward passes, which
    show whether the loss is a mean and the same each time, and, with several batches, up to two products of two batches
    together, which show what the loss is a mean over: the weights of batches follow from that.

    After ``LINEARISE_AFTER`` columns each batch's product is traced once into a straight-line linear program (one
    gradient's intermediates are kept), which spares every later chunk the gradient itself and its dispatch.

    Args:
        model: the model, in eval mode if it has dropout or batch normalisation.
        loss: ``loss(model, batch)`` -> 0-dim tensor, the mean over the batch.
        params: name -> tensor (the model's own, or other values to take the Hessian at); None for all trainable ones.
            The vector order is this order, each tensor flattened row-major.
        batches: batches of one structure; they may differ in size.
        count: what a batch's loss is a mean over, as a function of the batch: its number of examples, or of predicted
            tokens (labels other than -100, the first of each row left out for a causal language model). It weights the
            batch, and is taken as given. Default: found from the batches (rows, entries, labels, masks) and the loss;
            refused where that leaves a doubt.
        mean_check: False for losses that compare the examples of a batch with each other (contrastive ones): the loss
            of the same examples twice is not asked to be the same, nor that of two batches together to be their mean.
            The operator is then the Hessian of the weighted mean of the batches' losses.
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
        count: Callable[[Any], float] | None = None,
        mean_check: bool = True,
        chunk: int = 16,
    ) -> None:
        checks.at_least("chunk", chunk, 1)
        own = checks.own_parameters(model, params)
        checks.deterministic(model)
        self._batches = checks.usable_batches(batches)
        self._module = _LossModule(model, loss)
        self._theta = {name: tensor.detach().clone() for name, tensor in own.items()}
        self._buffers = {f"model.{name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._sizes = [tensor.numel() for tensor in own.values()]
        self._chunk = chunk
        self._forward_mode, self._plain, self._no_forward_mode = True, False, ""
        self._columns_asked = 0
        self._programs: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None
        first = next(iter(own.values()))
        self.dtype, self.device = first.dtype, first.device
        self.shape = (sum(self._sizes), sum(self._sizes))
        with self._differentiable(), torch.inference_mode(False), torch.enable_grad():
            with torch.no_grad():
                checks.mean_loss(lambda b: self._value(self._theta, b), self._batches, mean_check=mean_check)
            checks.dependence(self._reverse_gradients, list(own), self._batches)
        self._choose_mode(self._batches[0])
        self._weights = self._weigh(model, count, mean_check)
        if not self._forward_mode:
            warnings.warn(
                f"the loss has no forward-mode second derivative ({self._no_forward_mode}): products are taken reverse "
                "over reverse and cannot be traced, so that each of them computes the gradient again; plain torch "
                "operations in place of the one named make them faster",
                stacklevel=2,
            )

    def _differentiable(self) -> AbstractContextManager[None]:
        return twice_differentiable(plain=self._plain)

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
        try:
            value = self._value(theta, batch)
            if not value.requires_grad:
                return dict.fromkeys(names)
            found = torch.autograd.grad(value, [theta[name] for name in names], allow_unused=True)
        except RuntimeError as error:
            if checks.checkpointed(error):
                raise checks.second_derivative(error) from error
            raise
        reentrant = "CheckpointFunctionBackward"  # hides what the module inside it depends on
        if None in found and any(node.name() == reentrant for node in symmetry.graph_of(value)):
            raise RuntimeError(checks.CHECKPOINTING)
        return dict(zip(names, found, strict=True))

    def _choose_mode(self, batch: Any) -> None:
        """One product, to choose forward mode where it exists and to fail now rather than an hour from now.

        Tried in this order: forward over reverse; the same with plain operations for functions torch lacks the
        derivatives of; reverse over reverse.
        """
        ones = {name: torch.ones_like(tensor) for name, tensor in self._theta.items()}
        errors: list[Exception] = []
        for forward_mode, plain in ((True, False), (True, True), (False, self._plain)):
            self._forward_mode, self._plain = forward_mode, plain
            try:
                self._alone(ones, batch)
                return
            except (RuntimeError, NotImplementedError) as error:
                errors.append(error)
                self._no_forward_mode = str(errors[0]).splitlines()[0]
        raise checks.second_derivative(errors[-1]) from errors[-1]

    def _alone(self, tangent: dict[str, Tensor], batch: Any) -> Tensor:
        """Product of one vector with the Hessian of one batch, flat."""
        with self._differentiable(), torch.inference_mode(False), torch.no_grad():
            return self._flat(self._product(tangent, batch))

    def _flat(self, by_name: dict[str, Tensor]) -> Tensor:
        return torch.cat([by_name[name].flatten() for name in self._theta])

    def _weigh(self, model: nn.Module, count: Callable[[Any], float] | None, mean_check: bool) -> list[float]:
        """The share of each batch in the mean; on the way every batch's product is checked."""
        if count is None and len(self._batches) > 1:
            signs = symmetry.directions(self._theta)[0]
            weighing = Weighing(model, self._batches, lambda batch: self._alone(signs, batch), ask=mean_check)
            return weighing.shares(self._checked_products())
        weights = [1.0] if count is None else counted(count, self._batches)
        for _ in self._checked_products():
            pass
        return weights

    def _checked_products(self) -> Iterator[Tensor]:
        """Each batch's product with one fixed vector, once it is known to be finite and symmetric."""
        u, v = symmetry.directions(self._theta)
        for i, batch in enumerate(self._batches):
            try:
                Hu, off = self._symmetric_product(u, v, batch, i)
            except (RuntimeError, NotImplementedError):  # this batch takes a way through the loss that others did not
                self._choose_mode(batch)
                Hu, off = self._symmetric_product(u, v, batch, i)
            if off > symmetry.tolerance(self.dtype) and not self._plain:
                self._plain = True
                Hu, off = self._symmetric_product(u, v, batch, i)
            if off > symmetry.tolerance(self.dtype):
                raise ValueError(self._why_asymmetric(i, off))
            yield Hu

    def _symmetric_product(
        self, u: dict[str, Tensor], v: dict[str, Tensor], batch: Any, i: int
    ) -> tuple[Tensor, float]:
        """H u for one batch, and how far its Hessian is from symmetric."""
        Hu, Hv = self._alone(u, batch), self._alone(v, batch)
        checks.finite(f"the Hessian of batches[{i}] (its product with a vector of signs)", Hu + Hv)
        return Hu, symmetry.asymmetry(self._flat(u), self._flat(v), Hu, Hv)

    def _why_asymmetric(self, i: int, off: float) -> str:
        batch = self._batches[i]
        theta = {name: tensor.clone().requires_grad_() for name, tensor in self._theta.items()}
        with self._differentiable(), torch.inference_mode(False):
            with torch.enable_grad():
                operations = symmetry.suspects(self._module.model, self._value(theta, batch))
            with torch.no_grad():
                names = symmetry.asymmetric_parameters(self._theta, lambda tangent: self._product(tangent, batch))
        return symmetry.message(i, off, symmetry.tolerance(self.dtype), operations, names)

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
        with torch.no_grad(), self._differentiable():
            for start in range(0, len(columns), self._chunk):
                chunk = columns[start : start + self._chunk]
                self._columns_asked += len(chunk)
                if self._programs is None and self._forward_mode and self._columns_asked > LINEARISE_AFTER:
                    self._programs = self._linearise()
                total = torch.zeros_like(chunk, memory_format=torch.contiguous_format)
                for i, weight in enumerate(self._weights):
                    product = self._chunk_product(self._unflatten(chunk), i)
                    total.add_(
                        torch.cat([product[n].reshape(len(chunk), -1) for n in self._theta], dim=1), alpha=weight
                    )
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
        with torch.no_grad(), self._differentiable():
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
