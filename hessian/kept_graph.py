"""Hessian-vector products by backward passes through a gradient that is computed once and keeps its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from . import heap
from .double_backward import ByHand

Product = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Multiplies a vector, given and returned as name -> tensor."""
AGREEMENT = 1e-5
"""Largest difference of a graph's product from the usual one, over the product's largest entry."""


@dataclass(frozen=True)
class Work:
    """What a call computes: its number of operations, and the number of elements of their results."""

    operations: int
    elements: int

    @property
    def per_operation(self) -> float:
        """Return the mean number of elements of an operation's result."""
        return self.elements / max(1, self.operations)


class Counter(TorchDispatchMode):
    """Counts the operations that make new tensors while it is active; the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = out if isinstance(out, (tuple, list)) else [out]
            elements = sum(result.numel() for result in results if isinstance(result, Tensor))
            self.work = Work(self.work.operations + 1, self.work.elements + elements)
        return out


class KeptGraph:
    """Products with the Hessian of one batch, each a single backward pass through a gradient that is computed once.

    The forward pass and the gradient are not computed again, as a forward-over-reverse product must. The graph holds
    the activations of a forward and a backward pass as long as this object lives. It does not hold the gradient: only
    its place in the graph is needed.

    Args:
        value: ``value(theta, batch)`` -> 0-dim loss.
        theta: name -> weights. They are not copied and must not change.
        batch: what ``value`` takes.

    Raises:
        RuntimeError: an operation has no second derivative in reverse mode.
    """

    def __init__(
        self, value: Callable[[dict[str, Tensor], Any], Tensor], theta: Mapping[str, Tensor], batch: Any
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
            with ByHand():
                loss = value(leaves, batch)
            gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        self._leaves = list(leaves.values())
        # A gradient that is constant, as that of a linear layer's bias under a linear loss, has no graph.
        self._edges: list[GradientEdge | None] = [get_gradient_edge(g) if g.requires_grad else None for g in gradient]
        del gradient, loss
        heap.trim(sum(leaf.numel() for leaf in self._leaves))

    def __call__(self, vector: Tensor) -> list[Tensor]:
        """Multiply a vector, [n]; return the product's parts, each of the shape of its parameter."""
        parts = vector.split([leaf.numel() for leaf in self._leaves])
        pairs = [
            (edge, part.view(leaf.shape))
            for edge, part, leaf in zip(self._edges, parts, self._leaves, strict=True)
            if edge is not None
        ]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self._leaves]
        outputs, cotangents = zip(*pairs, strict=True)
        products = torch.autograd.grad(outputs, self._leaves, cotangents, retain_graph=True, materialize_grads=True)
        return [product.detach() for product in products]

    def multiply(self, vector: Tensor, out: Tensor, weight: float = 1.0) -> None:
        """Add the product times a weight to ``out``, [n]."""
        parts, start = self(vector)[::-1], 0
        while parts:
            part = parts.pop()  # and free it, so that the product does not occupy memory twice
            out[start : start + part.numel()].add_(part.reshape(-1), alpha=weight)
            start += part.numel()

    def gap(self, vector: Tensor, product: Mapping[str, Tensor]) -> float:
        """Return the largest difference of the product with a vector, [n], from a given one, name -> part."""
        parts, largest = self(vector)[::-1], 0.0
        for given in product.values():
            part = parts.pop()  # autograd may return one tensor for two parameters: it is not written to
            largest = max(largest, float((part - given).abs_().max()))
        return largest


class GraphProducts:
    """Products of single vectors by the gradient graphs of all batches.

    The graph of a single batch is kept. With several batches, no graph outlives a call: each is built, multiplies all
    vectors of the call and is freed, so that memory does not grow with the number of batches.

    Args:
        make: index of a batch -> its graph.
        batches: number of batches.

    Attributes:
        usable: whether graphs may be used; False once one of them gave other products than the usual way.
        work: what one product of the first batch computes; None before ``second`` was called for it.
    """

    def __init__(self, make: Callable[[int], KeptGraph], batches: int) -> None:
        self._make, self._batches = make, batches
        self._kept: KeptGraph | None = None
        self.usable = True
        self.work: Work | None = None

    @property
    def kept(self) -> bool:
        """Whether a graph is kept between calls."""
        return self._kept is not None

    def forget(self) -> None:
        """Drop the kept graph; the next call builds it anew."""
        self._kept = None

    def graph(self, i: int) -> KeptGraph:
        """Return the graph of batch i, built if it is not kept."""
        if self._kept is not None:
            return self._kept
        graph = self._make(i)
        if self._batches == 1:
            self._kept = graph
        return graph

    def second(self, i: int, u: Tensor, v: Tensor, usual: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return batch i's product with v if its product with u is ``usual``; otherwise None, and use no more graphs.

        Args:
            i: index of the batch.
            u: [n], of any dtype.
            v: [n], of any dtype.
            usual: the product with u, computed without the graph, name -> part.
        """
        dtype = next(iter(usual.values())).dtype
        try:
            graph = self.graph(i)
            with Counter() as counter:
                off = graph.gap(u.to(dtype), usual)
            self.work = counter.work if i == 0 else self.work
            self.usable = off <= AGREEMENT * max(float(part.abs().max()) for part in usual.values())
            if self.usable:
                return dict(zip(usual, graph(v.to(dtype)), strict=True))
        except (RuntimeError, NotImplementedError):  # An operation without a second derivative in reverse mode.
            self.usable = False
        self._kept = None
        return None

    def multiply(self, rows: Tensor, out: Tensor, weights: Sequence[float]) -> None:
        """Add the products of all rows, [k, n] each, to ``out``; batch i has the weight ``weights[i]``."""
        for i, weight in enumerate(weights):
            graph = self.graph(i)
            for row, into in zip(rows, out, strict=True):
                graph.multiply(row.contiguous(), into, weight)
