r"""Rounding of bf16 parameters that have no fp32 copy, so that small steps are not lost.

A bf16 number has 8 significant bits, so a step of less than 2^-9 of a weight leaves the weight unchanged when the
result is rounded to nearest. There are two remedies:

**"stochastic"**: the new value is rounded up or down at random, with the probabilities that make its mean exact. It
needs no state. The random numbers are a function of (element, step, seed) alone, so the result does not depend on
threads or on the order of the elements. The rounding reads the bits of the exact fp32 value as an unsigned integer
``x``. These bits are sign and magnitude, so it is the magnitude that is rounded::

    r      = hashed(element's row-major index, step, seed ^ 0x5BD1E995) >> 16        0 .. 65535
    bf16   = (x + r) >> 16                                              infinities and NaN: rounded as torch does

The magnitude is rounded up with probability (low 16 bits of x) / 65536. Source: Gupta et al., arXiv 1502.02551,
section 2.2. A value beyond the largest bf16 number may become infinite, as it may under rounding to nearest.

**"kahan"**: a bf16 tensor ``compensation`` of the parameter's shape stores the rounding error and adds it to the next
step. Source: Kahan, Comm. ACM 8(1), 1965; for training, Zamirai et al., arXiv 2010.06192. The arithmetic is fp32, and
every operation is rounded separately::

    y             = compensation + delta
    new           = bf16(param + y)
    compensation  = bf16(y - (new - param))

The step is ``delta = -decay * param - change``.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARAMETER_STREAM = 0x5BD1E995
"""XORed into a tensor's seed to round its parameter, so that other uses of the seed draw other random numbers."""
_MASK = 0xFFFFFFFF
INCREMENT = 0x9E3779B9
"""What ``hashed`` adds to the seed for each index, so that a shifted seed is a shifted index."""


def hashed(index: Tensor, step: int | Tensor, seed: int) -> Tensor:
    """Compute counter-based random numbers of 32 bits.

    The number of index i, with all arithmetic modulo 2^32::

        x = i * 0x9E3779B9 + step * 0x85EBCA6B + seed
        x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16

    The finaliser is Wellons' lowbias32. Indices that differ by a multiple of 2^32 have the same number.

    Args:
        index: int64, >= 0, any shape; not changed.
        step: number of the step, beginning at 1; an int64 tensor if the host must not wait for its value.
        seed: the tensor's seed, uint32.

    Returns:
        int64, shape of ``index``, in 0 .. 2^32 - 1.
    """
    start = (step * 0x85EBCA6B + seed) & _MASK
    # Two of the factors are reduced by 2^32, so that the products fit int64.
    x = (index & _MASK).mul_(INCREMENT - (1 << 32)).add_(start).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B - (1 << 32)).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


def indices(first: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Return ``count`` indices from ``first`` on, int64; ``first`` itself if it already holds all of them."""
    return first if isinstance(first, Tensor) else torch.arange(first, first + count, device=device)


def stochastic(exact: Tensor, *, step: int | Tensor, seed: int, first: int | Tensor = 0) -> Tensor:
    """Round fp32 values to bf16 at random, so that the mean of the result is exact.

    Args:
        exact: fp32, any shape; not changed.
        step: number of the step, beginning at 1.
        seed: the tensor's seed, uint32; this function XORs ``PARAMETER_STREAM`` into it.
        first: row-major index, in the whole tensor, of the first element of ``exact``; or the indices of all elements,
            int64 [numel], if they are not neighbours there.

    Returns:
        bf16, shape of ``exact``.
    """
    index = indices(first, exact.numel(), exact.device)
    noise = hashed(index, step, seed ^ PARAMETER_STREAM).bitwise_right_shift_(16)
    bits = exact.contiguous().view(torch.int32).flatten()
    # Integer addition carries from the mantissa into the exponent, as rounding up requires. Infinities and NaN must not
    # be changed this way.
    rounded = bits.add(noise.to(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return torch.where(exact.isfinite(), rounded.view(exact.shape), exact.to(torch.bfloat16))


def kahan(param: Tensor, compensation: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to a bf16 parameter with Kahan's compensation of the rounding error.

    Args:
        param: bf16; not changed.
        compensation: bf16, the error of the earlier roundings; not changed.
        delta: fp32, the step to add.

    Returns:
        (the new parameter, the new compensation), both bf16.
    """
    y = compensation.float() + delta
    new = (param.float() + y).to(torch.bfloat16)
    return new, (y - (new.float() - param.float())).to(torch.bfloat16)


def apply(
    param: Tensor,
    change: Tensor,
    *,
    decay: float | Tensor,
    how: str | None = None,
    compensation: Tensor | None = None,
    step: int | Tensor = 0,
    seed: int = 0,
    first: int | Tensor = 0,
) -> None:
    """Set ``param = (1 - decay) * param - change`` in place, computed in ``change``'s dtype and rounded once.

    Args:
        param: a parameter or a slice of one, any strides; changed.
        change: fp32 (float64 for a float64 parameter), shape of ``param``; may be changed.
        decay: lr * weight_decay.
        how: None (to nearest), "stochastic" or "kahan"; the last two are for bf16 parameters only.
        compensation: bf16, shape of ``param``, needed for "kahan"; changed.
        step: number of the step, beginning at 1; used by "stochastic".
        seed: the tensor's seed, uint32; used by "stochastic".
        first: row-major index, in the whole tensor, of the first element of ``param``, or of all elements; used by
            "stochastic".

    Raises:
        ValueError: ``how`` is unknown or does not apply to the parameter's dtype, or "kahan" has no compensation.
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
            "bf16_rounding='kahan' needs a bf16 compensation of the parameter's shape, but it is None; pass zeros at "
            "the first step"
        )
    new, error = kahan(param, compensation, param.float() * -decay - change)
    param.copy_(new)
    compensation.copy_(error)
