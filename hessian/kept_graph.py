"""Hessian-vector products from one gradient whose graph is kept: the cheapest way for single vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Product = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Multiplies a vector, given and returned as name -> tensor."""
KEEP_AFTER = 2
"""Number of single vectors after which a gradient's graph is kept for further ones."""


class KeptGraph:
    """Products with the Hessian of one batch, each a single backward pass through a gradient that is computed once.

    The forward pass and the gradient are not computed again, as a forward-over-reverse product must. Vectors that come
    in blocks are better served by ``vmap``, which shares the gradient among them and keeps no graph. The graph holds
    the activations of a forward and a backward pass as long as this object lives.

    Args:
        value: ``value(theta, batch)`` -> 0-dim loss.
        theta: name -> weights.
        batch: what ``value`` takes.

    Raises:
        RuntimeError: an operation has no second derivative in reverse mode.
    """

    def __init__(
        self, value: Callable[[dict[str, Tensor], Any], Tensor], theta: Mapping[str, Tensor], batch: Any
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._theta = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
            loss = value(self._theta, batch)
            self._gradient = torch.autograd.grad(
                loss, list(self._theta.values()), create_graph=True, materialize_grads=True
            )

    def __call__(self, tangent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply a vector, given and returned as name -> tensor."""
        # A gradient that is constant, as that of a linear layer's bias under a linear loss, has no graph.
        pairs = [(g, tangent[name]) for name, g in zip(self._theta, self._gradient, strict=True) if g.requires_grad]
        if not pairs:
            return {name: torch.zeros_like(tensor) for name, tensor in self._theta.items()}
        outputs, cotangents = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            outputs, list(self._theta.values()), cotangents, retain_graph=True, materialize_grads=True
        )
        return {name: product.detach() for name, product in zip(self._theta, products, strict=True)}


class SingleProducts:
    """Products with single vectors: the usual ones at first, then those of a kept graph if they are the same.

    Args:
        make: returns the graph, or None if there is none to keep.

    Attributes:
        graph: the graph in use; None at first, or if there is none.
    """

    def __init__(self, make: Callable[[], KeptGraph | None]) -> None:
        self._make, self._asked = make, 0
        self.graph: KeptGraph | None = None

    def __call__(self, tangent: dict[str, Tensor], usual: Product) -> dict[str, Tensor]:
        """Multiply one vector; ``usual`` is the product without a kept graph."""
        if self.graph is not None:
            return self.graph(tangent)
        product = usual(tangent)
        self._asked += 1
        if self._asked == KEEP_AFTER + 1:
            self.graph = self._checked(tangent, product)
        return product

    def _checked(self, tangent: dict[str, Tensor], product: dict[str, Tensor]) -> KeptGraph | None:
        """Return the graph if its product is the given one; a product of zeros would show nothing."""
        try:
            graph = self._make()
            again = {} if graph is None else graph(tangent)
        except (RuntimeError, NotImplementedError):  # An operation without a second derivative in reverse mode.
            return None
        scale = max(float(tensor.abs().max()) for tensor in product.values())
        off = max((float((again[name] - product[name]).abs().max()) for name in again), default=0.0)
        return graph if scale > 0 and off <= 1e-5 * scale else None
