"""Check that Hessian-vector products are symmetric.

Some double backward passes drop terms. The products then look plausible, and only their asymmetry shows the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest |u.Hv - v.Hu| over the products' norms, by dtype. float64 models that compute in float32 inside pass."""
COARSE = 5e-2
"""Largest |u.Hv - v.Hu| over the products' norms for 16-bit dtypes."""
MOST_TENSORS = 64
"""With more parameters than this, asymmetric ones are not searched for: the search costs two products for each."""


def directions(theta: Mapping[str, Tensor], k: int = 2) -> list[dict[str, Tensor]]:
    """Return k fixed vectors of random signs, each a dict by parameter name."""
    generator = torch.Generator().manual_seed(0)

    def signs(like: Tensor) -> Tensor:
        return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like.device, like.dtype)

    return [{name: signs(tensor) for name, tensor in theta.items()} for _ in range(k)]


def rounding(product: Tensor) -> float:
    """Return the norm that rounding alone gives a product with a zero Hessian, for losses and weights near 1."""
    return 64 * torch.finfo(product.dtype).eps * math.sqrt(product.numel())


def tolerance(dtype: torch.dtype) -> float:
    """Return the asymmetry that rounding alone may cause."""
    return TOLERANCE.get(dtype, COARSE)


def asymmetry(u: Tensor, v: Tensor, Hu: Tensor, Hv: Tensor) -> float:
    """Return |u.Hv - v.Hu| over |Hu| + |Hv|; for random signs it is about ||H - H^T|| / ||H||."""
    noise = rounding(Hu) / tolerance(Hu.dtype)
    u, v, Hu, Hv = (x.to(torch.float64) for x in (u, v, Hu, Hv))
    return float((u @ Hv - v @ Hu).abs()) / (float(Hu.norm() + Hv.norm()) + noise)


def asymmetric_parameters(
    theta: Mapping[str, Tensor], product: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> list[str]:
    """Return the parameters with asymmetric Hessian blocks, the worst first; [] if there are too many to search."""
    names = list(theta)
    if len(names) > MOST_TENSORS:
        return []
    u, v = directions(theta)
    left = {name: product(_only(name, v)) for name in names}  # H v_a
    right = {name: product(_only(name, u)) for name in names}  # H u_a
    off = torch.tensor(
        [[float(abs((u[b] * left[a][b]).sum() - (v[a] * right[b][a]).sum())) for b in names] for a in names]
    )
    per_parameter = off.sum(0) + off.sum(1)
    order = per_parameter.argsort(descending=True).tolist()
    return [names[i] for i in order if float(per_parameter[i]) > 0.1 * float(per_parameter.max())]


def _only(name: str, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {other: x if other == name else torch.zeros_like(x) for other, x in vector.items()}


def graph_of(value: Tensor) -> Iterator[Any]:
    """Yield every node of a value's autograd graph once."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def suspects(model: nn.Module, value: Tensor) -> list[str]:
    """Name the operations that may have a wrong second derivative: custom autograd functions, and known torch cases.

    Args:
        model: the model.
        value: its loss, with an autograd graph.
    """
    names: set[str] = set()
    for node in graph_of(value):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.add(f"the autograd function {type(node).__name__.removesuffix('Backward')}")
        elif "WeightNorm" in node.name():
            names.add("torch's weight_norm")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            names.add(
                f"the embedding {name!r}, whose gradient leaves row {module.padding_idx} out although the loss depends "
                "on it (set its padding_idx to None)"
            )
    return sorted(names)


def message(i: int, off: float, allowed: float, operations: Sequence[str], names: Sequence[str]) -> str:
    """Return the error message for an asymmetric Hessian.

    Args:
        i: index of the batch.
        off: the asymmetry.
        allowed: the tolerance.
        operations: operations that may cause it, from ``suspects``.
        names: parameters with asymmetric blocks, from ``asymmetric_parameters``.
    """
    where = f"; the asymmetry is in the parameters {list(names[:5])}" if names else ""
    who = f"; the cause may be {', '.join(operations)}" if operations else ""
    return (
        f"the Hessian of batches[{i}] is not symmetric: |u.Hv - v.Hu| is {off:.2g} of the products' norms, rounding "
        f"allows {allowed:.0e}{where}{who}. Some operation has a wrong second derivative: replace it with plain torch "
        "operations, or leave those parameters out of params"
    )
