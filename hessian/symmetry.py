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
SLICE = 2**20
"""Number of elements of a vector that are converted to float64 at a time."""
MOST_TENSORS = 64
"""With more parameters than this, asymmetric ones are not searched for: the search costs two products for each."""


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Return independent random signs, int8 [count]."""
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def direction(theta: Mapping[str, Tensor], seed: int) -> Tensor:
    """Return a fixed vector of random signs, int8 [n], on the parameters' device.

    The caller converts it when it multiplies: signs that wait take a quarter of the memory.
    """
    generator = torch.Generator().manual_seed(seed)
    count = sum(tensor.numel() for tensor in theta.values())
    return random_signs(count, generator).to(next(iter(theta.values())).device)


def split(theta: Mapping[str, Tensor], vector: Tensor) -> dict[str, Tensor]:
    """Return the parts of a vector [n] by parameter name, as views of it."""
    parts = vector.split([tensor.numel() for tensor in theta.values()])
    return {name: part.view(theta[name].shape) for name, part in zip(theta, parts, strict=True)}


def rounding(dtype: torch.dtype, n: int) -> float:
    """Return the norm that rounding alone gives a product, [n], with a zero Hessian, for losses and weights near 1."""
    return 64 * torch.finfo(dtype).eps * math.sqrt(n)


def tolerance(dtype: torch.dtype) -> float:
    """Return the asymmetry that rounding alone may cause."""
    return TOLERANCE.get(dtype, COARSE)


def asymmetry(u: Tensor, v: Tensor, Hu: Mapping[str, Tensor], Hv: Mapping[str, Tensor]) -> float:
    """Return |u.Hv - v.Hu| over |Hu| + |Hv|; for random signs it is about ||H - H^T|| / ||H||.

    Args:
        u: [n].
        v: [n].
        Hu: the product with u, name -> part, in the order of the vectors.
        Hv: the product with v.
    """
    skew, squares = 0.0, [0.0, 0.0]
    vectors = zip(split(Hu, u).values(), split(Hv, v).values(), Hu.values(), Hv.values(), strict=True)
    for whole in vectors:
        for parts in zip(*(x.reshape(-1).split(SLICE) for x in whole), strict=True):  # float64 copies of slices: small
            a, b, Ha, Hb = (x.to(torch.float64) for x in parts)
            skew += float(a @ Hb - b @ Ha)
            squares = [squares[0] + float(Ha @ Ha), squares[1] + float(Hb @ Hb)]
    dtype = next(iter(Hu.values())).dtype
    noise = rounding(dtype, len(u)) / tolerance(dtype)
    return abs(skew) / (math.sqrt(squares[0]) + math.sqrt(squares[1]) + noise)


def require(vectors: Tensor, products: Tensor, dtype: torch.dtype) -> None:
    """Check that products of an operator with several random vectors are those of a symmetric one.

    It costs no further product: for a symmetric A, x.Ay is y.Ax for every two of the vectors.

    Args:
        vectors: [n, k], with entries near 1 in magnitude, or 0.
        products: [n, k].
        dtype: dtype in which the products were computed; its rounding is allowed.

    Raises:
        ValueError: two vectors show that the operator is not symmetric.
    """
    if vectors.shape[1] < 2:
        return
    cross = vectors.to(torch.float64).T @ products.to(torch.float64)
    norms = products.to(torch.float64).norm(dim=0)
    noise = rounding(dtype, len(products)) / tolerance(dtype)
    off = float(((cross - cross.T).abs() / (norms[:, None] + norms + noise)).max())
    if off > tolerance(dtype):
        raise ValueError(
            f"the operator is not symmetric: |x.Ay - y.Ax| is {off:.2g} of the products' norms for two random vectors "
            f"x and y, and rounding allows {tolerance(dtype):.0e}. Every algorithm needs a symmetric operator: mend "
            "its products, or multiply by its symmetric part, (Ax + A^T x) / 2"
        )


def asymmetric_parameters(
    theta: Mapping[str, Tensor], product: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> list[str]:
    """Return the parameters with asymmetric Hessian blocks, the worst first; [] if there are too many to search."""
    names = list(theta)
    if len(names) > MOST_TENSORS:
        return []
    first = next(iter(theta.values()))
    u, v = (split(theta, direction(theta, seed).to(first.dtype)) for seed in (0, 1))
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
