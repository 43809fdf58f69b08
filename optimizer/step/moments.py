r"""First moments quantised to eight or four bits per element: the specification, in eager torch operations.

**What is stored.** A *row* consists of the last axes of a tensor, as few of them as have 64 elements together; the
first axis is never part of a row. So a row is the last axis of nearly every weight, and the axes (in, height, width) of
a convolution's weight. Each row is cut into blocks of ``block`` elements (the last block may be shorter), and each
block has one scale. In the table, ``lead`` are the axes in front of the row, and ``n`` is the number of elements of a
row:

    ===============  ==========================================  =============================================
    state            int8 (blocks of 128)                        int4 (blocks of 32)
    ===============  ==========================================  =============================================
    exp_avg          int8, the parameter's shape                 uint8 [*lead, ceil(n / 2)], low nibble first,
                                                                 two's complement, an unused nibble is 0
    exp_avg_scale    fp32 [*lead, ceil(n / 128)]                 bf16 [*lead, ceil(n / 32)]
    ===============  ==========================================  =============================================

Before the first step, all bytes of codes and scales are zero. Two rows never share a scale, so codes and scales can be
sharded along an axis of ``lead`` in the same way as the parameter. Codes and scales are contiguous for any strides of
the parameter.

**What a code means.** The value grows with the square of the code ``c``, which is in -127..127 or -7..7::

    value(c) = (c * |c|) * scale

**How a block is quantised.** The dtype T is fp32, or float64 for a float64 parameter. Every operation is rounded to T
separately::

    absmax = max |m_i|
    absmax NaN or infinite:   scale = NaN, codes = 0      (the block stays NaN, so the error remains visible)
    absmax < 2^-100:          scale = 0,   codes = 0
    otherwise:                scale = fp32(absmax / levels^2)           levels = 127 or 7; a bf16 scale is rounded up
                              x_i   = |m_i| * (1 / scale)
                              low_i = floor(sqrt(x_i))
                              c_i   = sign(m_i) * min(levels, low_i + (u_i * (2 low_i + 1) < x_i - low_i^2))

This is stochastic rounding: a code is rounded up with the probability that makes the mean of value(c_i) equal to m_i.
The random numbers u_i in [0, 1) depend only on the block, the step and the tensor's seed. They are a Weyl sequence that
starts at one hash per block::

    base = rounding.hashed(the block's row-major index among the tensor's scales, step, seed)
    u_i  = (((base + i * 0x9E3779B9) mod 2^32) >> 8) * 2^-24                    i: the element's index in its block

**How a tensor is stepped.** The second moment v is updated first. With ``keep`` = 1 - lr * weight_decay
and ``factor`` = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), the step is as follows. Scalars are computed in
double precision and rounded to T once. Every operation is rounded separately (no fused multiply-add)::

    m      = beta1 * value(codes, scale) + (1 - beta1) * g          g in T; -g to maximise
    param  = keep * param - factor * m                              m before it is quantised
    codes, scale = quantise(m)

**Shards.** Codes and scales of whole rows are those of the whole tensor, and so are the random numbers: a block's index
is the one among the whole tensor's scales (``step.places``). Where a shard has pieces of rows, each piece is quantised
as a row of its own, or, in a flattened tensor, each block from the elements that the shard has of it.

Rounding to nearest would freeze moments: without a gradient, 0.9 times the value of a small code rounds to the same
code at every step; in int4 all codes do. Adding the rounding error of the moment to the parameter would lose
nothing, but it costs stability: in int4, step sizes have to be ten times smaller. ``docs/low_bit.md`` has the
measurements.

**Small tensors** have an unquantised moment (fp32; float64 for a float64 parameter) and no scale. A tensor is small if
it has fewer than 4,096 elements, fewer than two axes, or rows of fewer than 16 elements. ``quantises`` decides from a
shape, which must be the shape of the whole tensor and not that of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rounding import INCREMENT, apply, hashed, indices

if TYPE_CHECKING:
    from .places import Place

SMALL = 4096
"""Tensors with fewer elements have an unquantised moment."""
_ROW = 64  # smallest number of elements of a row, if the axes after the first one have that many
_SHORTEST = 16  # elements; in shorter rows the scales would cost more bytes than the codes save
_CHUNK = 1 << 15  # elements per chunk of a step, which bounds the size of the temporaries
_TINY = 2.0**-100  # a block with a smaller absmax is stored as zeros: 1 / scale could overflow, and squares underflow


@dataclass(frozen=True)
class Format:
    """A storage format of quantised first moments.

    Attributes:
        name: the value of ``exp_avg_dtype`` that selects the format.
        bits: number of bits per code.
        block: number of neighbouring elements of a row that share a scale.
        scale_dtype: dtype of the scales.
    """

    name: str
    bits: int
    block: int
    scale_dtype: torch.dtype

    @property
    def levels(self) -> int:
        """The largest code, which is also the number of positive codes."""
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which codes are stored; a uint8 contains two 4-bit codes."""
        return torch.int8 if self.bits == 8 else torch.uint8


INT8, INT4 = Format("int8", 8, 128, torch.float32), Format("int4", 4, 32, torch.bfloat16)
FORMATS = {format.name: format for format in (INT8, INT4)}


def row_axes(shape: Sequence[int]) -> int:
    """Return how many of the last axes form a row: as few as have 64 elements together, and never the first axis."""
    axes = 1
    while axes < len(shape) - 1 and prod(shape[-axes:]) < _ROW:
        axes += 1
    return axes


def quantises(shape: Sequence[int]) -> bool:
    """Whether a tensor has a quantised moment; ``shape`` is that of the whole tensor, not of a shard."""
    return len(shape) >= 2 and prod(shape) >= SMALL and prod(shape[-row_axes(shape) :]) >= _SHORTEST


def state_shapes(
    shape: Sequence[int], format: Format, axes: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of (exp_avg, exp_avg_scale) of a quantised tensor.

    Args:
        shape: shape of the tensor, or of a shard of it.
        format: the format.
        axes: ``row_axes`` of the whole tensor, if this is the shape of a shard.
    """
    shape, axes = tuple(shape), axes or row_axes(shape)
    return stored_shapes(shape[:-axes], shape[-axes:], format)


def stored_shapes(lead: tuple[int, ...], row: Sequence[int], format: Format) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of (exp_avg, exp_avg_scale); ``row`` are a row's axes, ``lead`` those in front of it."""
    n = prod(row)
    return (*lead, *row) if format.bits == 8 else (*lead, -(-n // 2)), (*lead, -(-n // format.block))


def zero_state(parameter: Tensor, format: Format) -> dict[str, Tensor]:
    """Return the first moment before the first step: ``exp_avg`` and ``exp_avg_scale`` on the parameter's device."""
    codes, scale = state_shapes(parameter.shape, format)
    return {
        "exp_avg": torch.zeros(codes, dtype=format.dtype, device=parameter.device),
        "exp_avg_scale": torch.zeros(scale, dtype=format.scale_dtype, device=parameter.device),
    }


def state_bytes(shape: Sequence[int], format: Format, axes: int | None = None) -> int:
    """Return the bytes of a quantised first moment, scales included; the arguments are those of ``state_shapes``."""
    codes, scale = state_shapes(shape, format, axes)
    return prod(codes) + format.scale_dtype.itemsize * prod(scale)


def format_of(exp_avg: Tensor) -> Format:
    """Return the format of stored codes, which their dtype determines."""
    return INT8 if exp_avg.dtype == torch.int8 else INT4


def quantise(
    m: Tensor, format: Format, *, step: int | Tensor, seed: int, first: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Quantise moments to codes and scales with stochastic rounding; the mean of the quantised values is exact.

    Args:
        m: fp32 or float64, [*lead, n], rows along the last axis; not changed.
        format: the format to store them in.
        step: number of the step, beginning at 1; an int64 tensor if the host must not wait for its value.
        seed: the tensor's seed, uint32.
        first: row-major index, among the blocks of the whole tensor, of the first block of ``m``; or the indices of all
            blocks, int64 [number of blocks], if they are not neighbours there.

    Returns:
        (codes as stored: int8 [*lead, n] or uint8 [*lead, ceil(n / 2)]; scales [*lead, ceil(n / block)]).
    """
    n = m.shape[-1]
    blocks = _blocks(m, format.block)
    absmax = blocks.abs().amax(-1, keepdim=True)  # NaN if the block contains a NaN
    scale = (absmax / format.levels**2).float()
    if format.scale_dtype == torch.bfloat16:  # rounded up, so that no element exceeds the value of the largest code
        scale = ((scale.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    scale.masked_fill_(absmax < _TINY, 0.0).masked_fill_(~absmax.isfinite(), float("nan"))
    x = blocks.abs().mul_(scale.to(m.dtype).reciprocal())
    low = x.sqrt().floor_()
    remainder = x.sub_(low.square())
    up = _uniform(scale, format.block, step, seed, first).mul(low * 2 + 1) < remainder
    codes = low.add_(up).clamp_(max=format.levels).copysign_(blocks).masked_fill_(~(scale > 0), 0.0).to(torch.int8)
    return packed(codes.flatten(-2)[..., :n], format), scale.squeeze(-1).to(format.scale_dtype)


def _uniform(scale: Tensor, block: int, step: int | Tensor, seed: int, first: int | Tensor) -> Tensor:
    """Return random fp32 numbers in [0, 1), shape [*lead, blocks, block], for scales of shape [*lead, blocks, 1]."""
    index = indices(first, scale.numel(), scale.device)
    along = torch.arange(block, device=scale.device) * INCREMENT
    # The sum is modulo 2^32, because int32 addition wraps around.
    numbers = hashed(index, step, seed).to(torch.int32).unsqueeze(-1) + along.to(torch.int32)
    numbers = numbers.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return numbers.float().mul_(2.0**-24).view(*scale.shape[:-1], block)


def dequantise(codes: Tensor, scale: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute the moments from their codes and scales.

    Args:
        codes: codes as stored, rows along the last axis.
        scale: scales, [*lead, ceil(n / block)].
        n: number of elements of a row.
        dtype: dtype of the result, fp32 or float64.

    Returns:
        Tensor of ``dtype``, [*lead, n].
    """
    format = format_of(codes)
    values = unpacked(codes, n).to(dtype)
    values = _blocks(values, format.block)
    return (values * values.abs()).mul_(scale.to(dtype).unsqueeze(-1)).flatten(-2)[..., :n]


def _blocks(rows: Tensor, block: int) -> Tensor:
    """Reshape [*lead, n] to [*lead, ceil(n / block), block], padded with zeros; a view if no padding is needed."""
    missing = -rows.shape[-1] % block
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (-1, block))


def packed(codes: Tensor, format: Format) -> Tensor:
    """Pack int8 codes as the format stores them: one code per byte, or two."""
    if format.bits == 8:
        return codes.contiguous()
    nibbles = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpacked(codes: Tensor, n: int) -> Tensor:
    """Return stored codes as int8 [..., n], one per element; ``n`` is the number of elements of a row."""
    if format_of(codes).bits == 8:
        return codes
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :n]
    return (nibbles ^ 8).view(torch.int8) - 8


def advance(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    beta1: float,
    maximize: bool,
    step: int | Tensor,
    seed: int,
    first: int | Tensor = 0,
) -> Tensor:
    """Update the quantised first moment of whole rows, in place.

    Args:
        grad: gradient, fp32 (float64 for a float64 parameter), [*lead, n]; not changed.
        codes: codes as stored, rows along the last axis; changed.
        scale: scales of the codes; changed.
        beta1: decay rate of the first moment, in [0, 1).
        maximize: whether to ascend the gradient instead of descending it.
        step: number of the step, beginning at 1; an int64 tensor if the host must not wait for its value.
        seed: the tensor's seed, uint32.
        first: row-major index, among the blocks of the whole tensor, of the first block of these rows, or of all
            their blocks.

    Returns:
        The new moment before it is quantised; dtype and shape of ``grad``.
    """
    m = dequantise(codes, scale, grad.shape[-1], grad.dtype).mul_(beta1)
    m.add_(grad * ((beta1 - 1) if maximize else (1 - beta1)))
    new_codes, new_scale = quantise(m, format_of(codes), step=step, seed=seed, first=first)
    codes.copy_(new_codes)
    scale.copy_(new_scale)
    return m


def move(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    factor: Tensor,
    *,
    beta1: float,
    decay: float | Tensor,
    maximize: bool,
    step: int | Tensor,
    seed: int,
    how: str | None = None,
    compensation: Tensor | None = None,
    first_row: int = 0,
    place: Place | None = None,
) -> None:
    """Update the first moment and the parameter, in place, after the second moment has been updated.

    Args:
        param: parameter, any shape that consists of whole rows, any strides; changed.
        grad: its gradient, same shape, any strides; not changed.
        exp_avg: codes as stored, or an unquantised moment of the parameter's shape; changed.
        exp_avg_scale: scales of the codes; changed. None for an unquantised moment.
        factor: lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps); broadcasts against ``param``.
        beta1: decay rate of the first moment, in [0, 1).
        decay: lr * weight_decay.
        maximize: whether to ascend the gradient instead of descending it.
        step: number of the step, beginning at 1, for the random numbers.
        seed: the tensor's seed, uint32, for the random numbers.
        how: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
        compensation: bf16, the parameter's shape: the rounding errors that "kahan" carries over; changed.
        first_row: index on the first axis of the tensor at which these tensors begin, if they are a slice of it; the
            random numbers are those of the whole tensor.
        place: where the tensor lies in a larger one whose random numbers it uses; None if it is no shard.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    full = (param, grad, factor.expand_as(param), *(() if compensation is None else (compensation,)))
    if exp_avg_scale is None:
        axes, chunks = 0, _row_views((exp_avg, *full), (), ())
    else:
        axes = param.dim() - exp_avg_scale.dim() + 1
        codes, format = exp_avg.flatten(-axes) if exp_avg.dtype == torch.int8 else exp_avg, format_of(exp_avg)
        chunks = _row_views(full, (codes, exp_avg_scale), (8 // format.bits, format.block))
    first = first_row * (param.numel() // max(1, len(param))) if param.dim() else 0
    first_block = first_row * exp_avg_scale[0].numel() if exp_avg_scale is not None else 0
    for views, stored in chunks:
        if axes:
            p, g, f, *rest = views
            g = g.to(dtype).flatten(-axes)
            index = (
                first_block if place is None else place.blocks(first_block, stored[1].numel(), format.block, g.device)
            )
            m = advance(g, *stored, beta1=beta1, maximize=maximize, step=step, seed=seed, first=index)
            u = m.view(p.shape).mul_(f)
            first_block += stored[1].numel()
        else:
            m, p, g, f, *rest = views
            new_moment = m.to(dtype) * beta1 + g.to(dtype) * ((beta1 - 1) if maximize else (1 - beta1))
            m.copy_(new_moment)
            u = m.to(dtype) * f
        at = first if place is None or how != "stochastic" else place.elements(first, p.numel(), p.device)
        apply(p, u, decay=decay, how=how, compensation=rest[0] if rest else None, step=step, seed=seed, first=at)
        first += p.numel()


_Tensors = tuple[Tensor, ...]


def _row_views(full: _Tensors, stored: _Tensors, per: tuple[int, ...]) -> Iterator[tuple[_Tensors, _Tensors]]:
    """Yield views of the same chunk of all tensors, in row-major order, of at most ``_CHUNK`` elements.

    A row that has several axes is never cut, so its chunk may be larger.

    Args:
        full: tensors of the parameter's shape.
        stored: codes and scales, whose last axis is the row; empty if the moment is not quantised.
        per: for each tensor of ``stored``, how many elements of a row correspond to one of its entries.
    """
    sample = full[0]
    leads = stored[0].dim() - 1 if stored else sample.dim() - 1
    if sample.numel() <= _CHUNK or (leads == 0 and sample.dim() > 1):
        yield full, stored
        return
    if leads and sample[0].numel() >= _CHUNK:
        for i in range(len(sample)):
            yield from _row_views(tuple(t[i] for t in full), tuple(t[i] for t in stored), per)
        return
    size = _CHUNK // sample[0].numel()
    full_chunks = [t.split(size) for t in full]
    stored_chunks = [t.split(size if leads else size // n) for t, n in zip(stored, per, strict=True)]
    for k in range(len(full_chunks[0])):
        yield tuple(t[k] for t in full_chunks), tuple(t[k] for t in stored_chunks)
