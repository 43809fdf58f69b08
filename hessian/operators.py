"""The Hessian of a mean loss as a linear operator over any subset of a model's parameters.

The Hessian is the Jacobian of a vector field, the gradient, at the weights. Another curvature matrix is a subclass that
overrides ``_field``; products, tracing, weights and checks are the same (``gauss_newton``).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap

from . import checks, heap, symmetry
from .kept_graph import GraphProducts, KeptGraph, Product, Work
from .linear import as_scipy
from .second_order import twice_differentiable
from .weights import Weighing, counted

logger = logging.getLogger("hessian")
LINEARISE_AFTER = 128
"""Number of columns after which products are traced; tracing costs about as much as this many products."""


LARGE = 2**14
"""Elements that an operation of a product makes, on average, from which on blocks are multiplied one vector at a time.

``vmap`` shares the fixed costs of operations among vectors, and moves more memory. ``benchmarks.hessian_products``
measures both ways over sizes. They are equal within noise at 7,000 to 16,000 elements; from 35,000 on the loop takes
0.63 to 0.78 of the time of ``vmap``. A wrong choice near the border thus costs little."""


class Call(nn.Module):
    """A module whose forward pass is function(model, batch), so that ``functional_call`` can replace the parameters."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """Return function(model, batch)."""
        return self.function(self.model, batch)


class HessianOperator:
    """The Hessian of the mean loss over all examples of all batches.

    ``H @ v`` and ``H.matmat(V)`` are exact products (Pearlmutter 1994); no matrix is formed. The operator only reads
    the model: weights, buffers, ``.grad`` and ``requires_grad`` do not change. The Hessian is taken at the weights at
    construction; do not change the model while the operator is in use. torch's fused attention kernels have no second
    derivative, so the operator uses the math kernel. It also uses plain operations for ``mse_loss``, ``huber_loss`` and
    weight normalisation, whose second derivatives torch lacks or computes wrongly.

    Construction computes two products per batch to check that the Hessian is symmetric, two gradients to check that
    they are deterministic, and a few forward passes to check that the loss is deterministic and a mean. With several
    batches, it also computes up to two products of two batches joined into one. They show what the loss is a mean over,
    which determines the weights of the batches.

    A vector alone is multiplied by one backward pass through a gradient whose graph is kept, about two gradients of
    work. Blocks are multiplied the same way, one vector at a time, if the operations of a product are large (see
    ``LARGE``), and under ``vmap`` if they are small. The choice follows from counting the elements that one product
    makes, not from a clock, so the same calls take the same way and give the same bits. Construction compares the first
    product of every graph with a forward-over-reverse one, and uses no graph if they differ.

    The graph of a single batch is held as long as the operator; it takes the memory of about two forward and backward
    passes. With several batches, every call builds the graph of one batch after the other and frees it, so memory does
    not grow with their number, and a vector alone costs about three gradients per batch.

    After ``LINEARISE_AFTER`` columns under ``vmap``, each batch's product is traced once into a straight-line linear
    program that stores the intermediates of one gradient. Later chunks then need not compute the gradient again.

    Args:
        model: the model, in eval mode if it has dropout or batch normalisation.
        loss: ``loss(model, batch)`` -> 0-dim tensor, the mean over the batch.
        params: name -> tensor: the model's parameters, or other values at which to take the Hessian; None for all
            trainable parameters. Vectors follow the order of this dict, each tensor flattened row-major.
        batches: batches of one structure; they may differ in size.
        count: function of a batch that returns what its loss is a mean over: the number of examples, or of predicted
            tokens (labels other than -100, without the first of each row for a causal language model). The batch is
            weighted by it, without a check. By default the count is inferred from the batches (rows, entries, labels,
            masks) and the loss; if the inference is ambiguous, an error is raised.
        mean_check: False for losses that compare the examples of a batch with each other, such as contrastive losses.
            The operator then does not check that the loss stays equal if every example occurs twice, nor that the loss
            of two joined batches is the mean of their losses. It is the Hessian of the weighted mean of the batches'
            losses.
        chunk: number of vectors per pass of ``vmap``; small chunks stay in cache and bound memory.

    Raises:
        TypeError: params, a batch or the loss has the wrong type.
        ValueError: params, a batch or the loss is not usable: empty, not finite, random, not a mean, or asymmetric.
        RuntimeError: an operation in the model has no second derivative.

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
        tensors = checks.checked_parameters(model, params)
        checks.deterministic(model)
        self._batches = checks.usable_batches(batches)
        self._module = Call(model, loss)
        with torch.inference_mode(False):  # A graph cannot be built through tensors of inference mode.
            self._theta = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._buffers = {f"model.{name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._sizes = [tensor.numel() for tensor in tensors.values()]
        self._chunk = chunk
        self._forward_mode, self._plain, self._no_forward_mode = True, False, ""
        self._columns_asked = 0
        self._graphs = GraphProducts(self._graph, len(self._batches))
        self._programs: list[Product] | None = None
        first = next(iter(tensors.values()))
        self.dtype, self.device = first.dtype, first.device
        self.shape = (sum(self._sizes), sum(self._sizes))
        with self._differentiable(), torch.inference_mode(False), torch.enable_grad():
            with torch.no_grad():
                checks.mean_loss(lambda b: self._value(self._theta, b), self._batches, mean_check=mean_check)
            # The first product, which takes most memory, reads the model's own weights; then they are copied. Not of a
            # loss that writes to weights, as nn.Embedding(max_norm=...) does: the model is the caller's.
            written = any(tensor._version for tensor in self._theta.values())
            if not written and not any(tensor.is_inference() for tensor in tensors.values()):
                self._theta = {name: tensor.detach() for name, tensor in tensors.items()}
            checks.gradients(self._reverse_gradients, list(tensors), self._batches)
        self._weights = self._weigh(model, count, mean_check)
        if not self._forward_mode:
            warnings.warn(
                f"the loss has no forward-mode second derivative ({self._no_forward_mode}): products are computed "
                "reverse over reverse and cannot be traced; for faster blocks of small products replace the named "
                "operation with plain torch operations",
                stacklevel=2,
            )

    def _differentiable(self) -> AbstractContextManager[None]:
        return twice_differentiable(plain=self._plain)

    @property
    def names(self) -> list[str]:
        """Parameter names, in vector order."""
        return list(self._theta)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The weights at which the matrix is taken: name -> a copy of the tensor."""
        return {name: tensor.clone() for name, tensor in self._theta.items()}

    @property
    def work(self) -> Work | None:
        """What one product with the first batch computes, counted; None where no graph of the gradient is usable."""
        return self._graphs.work if self._graphs.usable else None

    @property
    def batches(self) -> list[Any]:
        """The batches, as they were given."""
        return list(self._batches)

    def _value(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        swapped = {f"model.{name}": tensor for name, tensor in theta.items()} | self._buffers
        return functional_call(self._module, swapped, (batch,), tie_weights=True)

    def _reverse_gradients(self, batch: Any, names: list[str]) -> dict[str, Tensor | None]:
        """Return gradients by reverse mode, None for a parameter that the loss does not depend on."""
        theta = {name: tensor.detach().requires_grad_(name in names) for name, tensor in self._theta.items()}
        try:
            value = self._value(theta, batch)
            if not value.requires_grad:
                return dict.fromkeys(names)
            grads = torch.autograd.grad(value, [theta[name] for name in names], allow_unused=True)
        except RuntimeError as error:
            if checks.checkpointed(error):
                raise checks.second_derivative(error) from error
            raise
        reentrant = "CheckpointFunctionBackward"  # This node hides the parameters used inside it from autograd.
        if None in grads and any(node.name() == reentrant for node in symmetry.graph_of(value)):
            raise RuntimeError(checks.CHECKPOINTING)
        return dict(zip(names, grads, strict=True))

    def _choose_mode(self, signs: Tensor, batch: Any) -> dict[str, Tensor]:
        """Return a product, by the first differentiation mode that gives one; an unsupported model fails here.

        The modes are tried in this order: forward over reverse; forward over reverse with plain operations instead of
        the functions whose derivatives torch lacks; reverse over reverse.
        """
        errors: list[Exception] = []
        for forward_mode, plain in ((True, False), (True, True), (False, self._plain)):
            self._forward_mode, self._plain = forward_mode, plain
            try:
                return self._batch_product(signs, batch)
            except (RuntimeError, NotImplementedError) as error:
                errors.append(error)
                self._no_forward_mode = str(errors[0]).splitlines()[0]
        raise checks.second_derivative(errors[-1]) from errors[-1]

    def _batch_product(self, signs: Tensor, batch: Any) -> dict[str, Tensor]:
        """Return the product of signs, int8 [n], with the Hessian of one batch.

        Neither the signs as numbers nor the product's parts are one vector. In forward mode torch copies a tangent
        that is a part of a larger tensor, and joining the parts takes them twice.
        """
        heap.trim(self.shape[0])  # What the last check freed.
        with self._differentiable(), torch.inference_mode(False), torch.no_grad():
            tangent = {name: part.to(self.dtype) for name, part in symmetry.split(self._theta, signs).items()}
            return self._product(tangent, batch)

    def _flat(self, by_name: dict[str, Tensor]) -> Tensor:
        """Join parts into one vector, [n]; they are taken out of the dict, so that nothing is in memory twice."""
        out = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for name, into in symmetry.split(self._theta, out).items():
            into.copy_(by_name.pop(name))
        return out

    def _weigh(self, model: nn.Module, count: Callable[[Any], float] | None, mean_check: bool) -> list[float]:
        """Return the share of each batch in the mean, and check every batch's product."""
        signs = symmetry.direction(self._theta, 0)
        products = self._checked_products(signs)
        if count is None and len(self._batches) > 1:

            def product_of(batch: Any) -> Tensor:
                return self._flat(self._batch_product(signs, batch))

            weighing = Weighing(model, self._batches, product_of, independent=mean_check)
            return weighing.shares(self._flat(product) for product in products)
        weights = [1.0] if count is None else counted(count, self._batches)
        for _ in products:
            pass
        heap.trim(self.shape[0])
        return weights

    def _checked_products(self, u: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield each batch's product with signs u, after checking that it is finite and symmetric."""
        for i, batch in enumerate(self._batches):
            try:
                Hu = self._batch_product(u, batch) if i else self._choose_mode(u, batch)
            except (RuntimeError, NotImplementedError):  # This batch runs a branch of the loss that no earlier one ran.
                Hu = self._choose_mode(u, batch)
            if not i:
                with torch.inference_mode(False):
                    self._theta = {name: tensor.clone() for name, tensor in self._theta.items()}
            off = self._asymmetry(u, Hu, i)
            if off > symmetry.tolerance(self.dtype) and not self._plain:
                self._plain = True
                self._graphs = GraphProducts(self._graph, len(self._batches))
                Hu = self._batch_product(u, batch)
                off = self._asymmetry(u, Hu, i)
            if off > symmetry.tolerance(self.dtype):
                raise ValueError(self._why_asymmetric(i, off))
            yield Hu
            del Hu  # The next product does not find this one in memory.

    def _asymmetry(self, u: Tensor, Hu: dict[str, Tensor], i: int) -> float:
        """Return the asymmetry of batch i's Hessian H, whose product with signs u is given."""
        what = f"the Hessian of batches[{i}] (its product with a vector of signs)"
        for part in Hu.values():
            checks.finite(what, part)
        v = symmetry.direction(self._theta, 1)
        Hv = None
        heap.trim(self.shape[0])
        if self._graphs.usable:
            with self._differentiable():
                Hv = self._graphs.second(i, u, v, Hu)
        if Hv is None:
            Hv = self._batch_product(v, self._batches[i])
        for part in Hv.values():
            checks.finite(what, part)
        return symmetry.asymmetry(u, v, Hu, Hv)

    def _why_asymmetric(self, i: int, off: float) -> str:
        batch = self._batches[i]
        theta = {name: tensor.clone().requires_grad_() for name, tensor in self._theta.items()}
        with self._differentiable(), torch.inference_mode(False):
            with torch.enable_grad():
                operations = symmetry.suspects(self._module.model, self._value(theta, batch))
            with torch.no_grad():
                names = symmetry.asymmetric_parameters(self._theta, lambda tangent: self._product(tangent, batch))
        return symmetry.message(i, off, symmetry.tolerance(self.dtype), operations, names)

    def _field(self, batch: Any) -> Product:
        """Return the vector field whose Jacobian at the weights is this operator's matrix for one batch."""
        gradient = grad(self._value)
        return lambda theta: gradient(theta, batch)

    def _product(self, tangent: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Return the product of one batch's matrix with a vector."""
        if self._forward_mode:
            return self._forward_product(tangent, batch)
        out: dict[str, Tensor] = vjp(self._field(batch), self._theta)[1](tangent)[0]
        return out

    def _forward_product(self, tangent: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = jvp(self._field(batch), (self._theta,), (tangent,))[1]
        return out

    def _program(self, batch: Any) -> Product:
        """Return the product as a function of the vector that stores what does not depend on the vector."""
        program: Product = linearize(self._field(batch), self._theta)[1]
        return program

    def _unflatten(self, columns: Tensor) -> dict[str, Tensor]:
        """Split vectors [k, n] into name -> [k, *shape]."""
        parts = columns.split(self._sizes, dim=1)
        return {n: p.reshape(-1, *t.shape) for (n, t), p in zip(self._theta.items(), parts, strict=True)}

    def matmat(self, vectors: Tensor) -> Tensor:
        """Multiply a block of vectors.

        Args:
            vectors: [n, k]; converted to the operator's dtype and device.

        Returns:
            The products, [n, k].

        Raises:
            ValueError: vectors does not have n rows and two axes.
        """
        if vectors.dim() != 2 or len(vectors) != self.shape[0]:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}; this operator needs [{self.shape[0]}, k]")
        columns = vectors.to(self.device, self.dtype).T
        with torch.inference_mode(False), torch.no_grad(), self._differentiable():
            out = torch.zeros_like(columns, memory_format=torch.contiguous_format)
            if self._one_by_one(len(columns)):
                self._graphs.multiply(columns, out, self._weights)
                return out.T
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

    def _linearise(self) -> list[Product]:
        """Trace one product per batch and check it against the untraced one; return [] if tracing fails."""
        probe = {
            name: torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape)
            for name, t in self._theta.items()
        }
        programs = []
        for batch in self._batches:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's tracer warns about nodes of its own graph.
                    program = self._program(batch)
                    traced, plain = program(probe), self._product(probe, batch)
            except Exception as error:  # Tracing is only an optimisation: the untraced product is always correct.
                logger.info(
                    "products cannot be traced (%s: %s); untraced products are used", type(error).__name__, error
                )
                return []
            scale = max(float(plain[name].abs().max()) for name in plain)
            if not all(float((traced[name] - plain[name]).abs().max()) <= 1e-5 * scale for name in plain):
                logger.warning("traced products differ from untraced ones; untraced ones are used")
                return []
            programs.append(program)
        return programs

    def _one_by_one(self, count: int) -> bool:
        """Return whether vectors are multiplied one at a time, by graphs of the gradient."""
        work = self._graphs.work
        if not self._graphs.usable or work is None:
            return False
        if count == 1:
            return self._graphs.kept or not self._programs
        return work.per_operation >= LARGE

    def _chunk_product(self, tangents: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        """Multiply a chunk of vectors by the Hessian of batch i."""
        batch = self._batches[i]
        program = self._programs[i] if self._programs else lambda tangent: self._product(tangent, batch)
        if len(next(iter(tangents.values()))) == 1:  # For one vector, vmap adds overhead and saves nothing.
            single = program({name: tensor[0] for name, tensor in tangents.items()})
            return {name: tensor.unsqueeze(0) for name, tensor in single.items()}
        out: dict[str, Tensor] = vmap(program)(tangents)
        return out

    def _graph(self, i: int) -> KeptGraph:
        """Return the graph of batch i's gradient."""
        return KeptGraph(self._value, self._theta, self._batches[i])

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self.matmat(vectors.unsqueeze(1)).squeeze(1)
        return self.matmat(vectors)

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, [n]."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with torch.no_grad(), self._differentiable():
            for weight, batch in zip(self._weights, self._batches, strict=True):
                batch_gradient = grad(self._value)(self._theta, batch)
                total.add_(self._flat(batch_gradient), alpha=weight)
        return total

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a float64 scipy ``LinearOperator``, for functions such as ``scipy.sparse.linalg.eigsh``."""
        return as_scipy(self)
