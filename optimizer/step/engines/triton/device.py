"""Functions that the kernels share; ``kernels.py`` describes their arguments."""
# mypy: ignore-errors
# This file does not import annotations from __future__, because Triton reads annotations as objects.

import triton
import triton.language as tl

ADDRESSES = tl.constexpr(6)
"""The columns of ``addresses``: parameter, gradient, first moment, second moment, counter, and means of columns."""


@triton.jit
def work(entries, programs, FIELDS: tl.constexpr):
    """Return (pointer to the program's entry, its unit); the first of an entry's FIELDS numbers is its tensor."""
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    return entries + tl.load(program).to(tl.int64) * FIELDS, tl.load(program + 1).to(tl.int64)


@triton.jit
def address(addresses, entry, which, dtype: tl.constexpr):
    """Return a pointer to column ``which`` of the entry's tensor in ``addresses``."""
    address = tl.load(addresses + ADDRESSES * tl.load(entry) + which)
    # ``accepts`` has checked the alignment, which allows loads of several numbers at a time.
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def stepping(mask, numbers):
    """Return the mask, or all False if the step is skipped."""
    return mask & (tl.load(numbers + 5).to(tl.int32) != 0)


@triton.jit
def gradients(grad, offsets, mask, numbers):
    """Load gradients as fp32, divided by the gradient scale and negated to ascend."""
    return tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(numbers + 4)


@triton.jit
def update(param, exp_avg, offsets, mask, g, scale, numbers):
    """Apply weight decay, update first moment and parameter; arithmetic is fp32 and each is rounded once."""
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    m = m + tl.load(numbers) * (g - m)
    p = tl.load(numbers + 2) * p + m * scale
    stepped = stepping(mask, numbers)
    tl.store(exp_avg + offsets, m.to(exp_avg.dtype.element_ty), mask=stepped)
    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=stepped)
