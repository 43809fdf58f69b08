"""Replace torch functions that have no second derivative, or a wrong one, with the same function in plain operations.

torch 2.13 has no forward-mode derivative of the backward pass of ``mse_loss`` and ``huber_loss``, and its double
backward of weight normalisation drops terms. Its fused attention kernels have no second derivative at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return values.mean() if reduction == "mean" else values.sum() if reduction == "sum" else values


def _mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced((input - target).square(), reduction)


def _huber_loss(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    gap = (input - target).abs()
    return _reduced(torch.where(gap <= delta, 0.5 * gap.square(), delta * (gap - 0.5 * delta)), reduction)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ||v||, with the norm over every axis except ``dim``, or over all axes if ``dim`` is -1."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else g / v.abs())


PLAIN: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    torch._weight_norm: _weight_norm,
}


class _PlainOperations(TorchFunctionMode):
    """Redirect calls of the functions in ``PLAIN`` to their replacements.

    A call with arguments that the replacement does not support goes to the original function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = PLAIN.get(func)
        if plain is None:
            return func(*args, **kwargs)
        set_kwargs = {name: value for name, value in kwargs.items() if value is not None}
        # size_average and reduce, the third and fourth arguments of mse_loss, are deprecated spellings of reduction.
        if (plain is _mse_loss and len(args) > 2) or not set(set_kwargs) <= set(plain.__annotations__):
            return func(*args, **kwargs)
        return plain(*args, **set_kwargs)


@contextlib.contextmanager
def twice_differentiable(*, plain: bool = False) -> Iterator[None]:
    """Restrict attention to kernels with second derivatives inside the context.

    Args:
        plain: whether to replace the functions in ``PLAIN``, too. This adds a Python call to every operation, so it is
            off by default.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _PlainOperations() if plain else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
