r"""bf16 parameters without a master copy: what a step is too small to change must not be lost.

A bf16 number has 8 significant bits; a step of less than 2^-9 of a weight rounds to nothing. Two ways around it:

**"stochastic"**: the new value is rounded up or down at random, with the probabilities that make its mean exact. No
state. Random numbers are a function of (element, step, seed) alone, so neither threads nor the order of work matter.
On the bits of the exact fp32 value, read as an unsigned integer ``x`` (sign and magnitude: it rounds the magnitude)::

    r      = hashed(element's row-major index, step, seed ^ 0x5BD1E995) >> 16        0 .. 65535
    bf16   = (x + r) >> 16                                              infinities and NaN: rounded as torch does

so the magnitude rounds up with probability (low 16 bits) / 65536. Source: the rounding of Gupta et al.,
arXiv 1502.02551, section 2.2; a value past the largest bf16 may become infinite, as under rounding to nearest.

**"kahan"**: a bf16 ``compensation`` of the parameter's shape holds what rounding lost and joins the next step (Kahan,
Comm. ACM 8(1), 1965; for training: Zamirai et al., arXiv 2010.06192), in fp32, each operation rounded on its own::

    y             = compensation + delta
    new           = bf16(param + y)
    compensation  = bf16(y - (new - param))

where the step is ``delta = -decay * param - change``.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARAMETER_STREAM = 0x5BD1E995
"""Xor of a tensor's seed for the rounding of its parameter, so that other uses of the seed have other numbers."""
_MASK = 0xFFFFFFFF


def hashed(index: Tensor, step: int | Tensor, seed: int) -> Tensor:
    """Counter-based random numbers of 32 bits.

    For index i, all modulo 2^32::

        x = i * 0x9E3779B9 + step * 0x85EBCA6B + seed
        x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16

    The finaliser is Wellons' lowbias32. Indices that differ by a multiple of 2^32 share a number.

    Args:
        index: int64, >= 0, any shape; not changed.
        step: the optimizer's step, 1 at the first; an int64 tensor where it must not be waited for.
        seed: of the tensor, uint32.

    Returns:
        int64, shape of ``index``, in 0 .. 2^32 - 1.
    """
    start = (step * 0x85EBCA6B + seed) & _MASK
    x = (index & _MASK).mul_(0x9E3779B9 - (1 << 32)).add_(start).bitwise_and_(_MASK)  # the negative twin fits int64
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B - (1 << 32)).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


def stochastic(exact: Tensor, *, step: int | Tensor, seed: int, first: int = 0) -> Tensor:
    """fp32 values rounded to bf16 at random, right on average.

    Args:
        exact: fp32, any shape; not changed.
        step: the optimizer's step, 1 at the first.
        seed: of the tensor, uint32; ``PARAMETER_STREAM`` is mixed in here.
        first: row-major index of ``exact``'s first element in its tensor, where it is a piece of one.

    Returns:
        bf16, shape of ``exact``.
    """
    index = torch.arange(first, first + exact.numel(), device=exact.device)
    noise = hashed(index, step, seed ^ PARAMETER_STREAM).bitwise_right_shift_(16)
    bits = exact.contiguous().view(torch.int32).flatten()
    # Adding to the bits carries from the mantissa into the exponent where it must; infinities and NaN stay out of it.
    moved = bits.add(noise.to(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return torch.where(exact.isfinite(), moved.view(exact.shape), exact.to(torch.bfloat16))


def kahan(param: Tensor, compensation: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """One compensated addition.

    Args:
        param: bf16; not changed.
        compensation: bf16, what earlier roundings lost; not changed.
        delta: fp32, what to add.

    Returns:
        (the new parameter, the new compensation), both bf16.
    """
    y = compensation.float() + delta
    new = (param.float() + y).to(torch.bfloat16)
    return new, (y - (new.float() - param.float())).to(torch.bfloat16)


def apply(
    param: Tensor, change: Tensor, *, decay: float | Tensor, how: str | None = None, compensation: Tensor | None = None,
    step: int | Tensor = 0, seed: int = 0, first: int = 0,
) -> None:  # fmt: skip
    """``param = (1 - decay) * param - change``, computed in ``change``'s dtype and rounded once, in place.

    Args:
        param: parameter or a piece of one, any strides; changed.
        change: fp32 (float64 for float64 parameters), same shape; may be changed.
        decay: lr * weight_decay.
        how: None, "stochastic" or "kahan"; the two are for bf16 parameters.
        compensation: of ``param``'s shape, for "kahan"; changed.
        step: for "stochastic": the optimizer's step, 1 at the first.
        seed: for "stochastic": of the tensor.
        first: for "stochastic": row-major index of the piece's first element.

    Raises:
        ValueError: ``how`` is unknown, not for this dtype, or lacks its compensation.
    """
    if how is None:
        param.copy_(param.to(change.dtype) * (1 - decay) - change)
        return
    if how not in ("stochastic", "kahan"):
        raise ValueError(f"bf16_rounding={how!r} must be None, 'stochastic' or 'kahan'")
    if param.dtype != torch.bfloat16:
        raise ValueError(f"bf16_rounding={how!r} is for bf16 parameters, this one is {param.dtype}; use None")
    if how == "stochastic":
        param.copy_(stochastic(param.float() * (1 - decay) - change, step=step, seed=seed, first=first))
        return
    if compensation is None:
        raise ValueError(
            "bf16_rounding='kahan' needs a bf16 compensation of the parameter's shape; give zeros at first"
        )
    new, left = kahan(param, compensation, param.float() * -decay - change)
    param.copy_(new)
    compensation.copy_(left)
