r"""First moments in eight or four bits a value: the specification, in eager torch operations.

**What is stored.** A *row* is the shortest tail of a tensor's axes that holds at least 64 elements; the first axis is
never part of it. So a row is the last axis of nearly every weight, and (in, height, width) of a convolution's. Rows are
cut into blocks of ``block`` elements (the last one may be shorter); a block has one scale. With ``lead`` the axes in
front of the row and ``n`` the row's length:

    ===============  ==========================================  =============================================
    state            int8 (blocks of 128)                        int4 (blocks of 32)
    ===============  ==========================================  =============================================
    exp_avg          int8, the parameter's shape                 uint8 [*lead, ceil(n / 2)], low nibble first,
                                                                 two's complement, a spare nibble is 0
    exp_avg_scale    fp32 [*lead, ceil(n / 128)]                 bf16 [*lead, ceil(n / 32)]
    ===============  ==========================================  =============================================

All state of a fresh tensor is zero bytes. Two rows never share a scale: a tensor cut along an axis of ``lead`` has its
codes and scales cut alike. Both are contiguous whatever the parameter's strides are.

**What a code means.** Codes follow a square law, with ``c`` in -127..127 or -7..7::

    value(c) = (c * |c|) * scale

**How a block is quantised**, in T, each operation rounded on its own (T: fp32; float64 for float64 parameters)::

    absmax = max |m_i|
    absmax NaN or infinite:   scale = NaN, codes = 0      (the block stays NaN: nothing vanishes silently)
    absmax < 2^-100:          scale = 0,   codes = 0
    otherwise:                scale = fp32(absmax / levels^2)           levels = 127 or 7; bf16: then rounded up
                              x_i   = |m_i| * (1 / scale)
                              low_i = floor(sqrt(x_i))
                              c_i   = sign(m_i) * min(levels, low_i + (u_i * (2 low_i + 1) < x_i - low_i^2))

That is stochastic rounding: up with the probability that makes the mean of value(c_i) equal m_i. The numbers u_i in
[0, 1) depend on nothing but the block, the step and the tensor's seed; one hash a block, then a Weyl sequence::

    base = rounding.hashed(the block's row-major index among the tensor's scales, step, seed)
    u_i  = (((base + i * 0x9E3779B9) mod 2^32) >> 8) * 2^-24                    i: the element's index in its block

**How a tensor takes a step**, with ``factor`` = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) from the
second moment and ``keep`` = 1 - lr * weight_decay; scalars are computed in double and rounded to T once, operations
are rounded one by one (no fused multiply-add)::

    m      = beta1 * value(codes, scale) + (1 - beta1) * g          g in T; -g to maximise
    param  = keep * param - factor * m                              the exact new moment
    codes, scale = quantise(m)

Rounding to nearest would freeze moments: without a gradient, 0.9 of a code rounds to the same code, for ever; in int4
every code does. Carrying what rounding takes over to the parameter would lose nothing, but costs stability: in int4
steps have to be ten times smaller. ``docs/low_bit.md`` has the measurements.

**Small tensors** keep an unquantised moment (fp32; float64 for float64 parameters) and no scale: fewer than 4,096
elements, fewer than two axes, or rows of fewer than 16 elements. ``quantises`` answers for a shape: ask it with the
whole tensor's shape, not a shard's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .rounding import apply, hashed

SMALL = 4096
"""Tensors of fewer elements keep an unquantised moment."""
_ROW = 64  # elements a row has at least, where the axes behind the first one have as many
_SHORTEST = 16  # shorter rows would pay more for scales than codes save
_PIECE = 1 << 15  # elements worked on at once: bounds the temporaries
_TINY = 2.0**-100  # below it 1 / scale could overflow; such a block is nothing, as its squares are


@dataclass(frozen=True)
class Format:
    """How moments of one kind are stored.

    Attributes:
        name: what ``exp_avg_dtype`` calls it.
        bits: per code.
        block: elements that share a scale, along a row.
        scale_dtype: of the scales.
    """

    name: str
    bits: int
    block: int
    scale_dtype: torch.dtype

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes as they are stored."""
        return torch.int8 if self.bits == 8 else torch.uint8


INT8, INT4 = Format("int8", 8, 128, torch.float32), Format("int4", 4, 32, torch.bfloat16)
FORMATS = {format.name: format for format in (INT8, INT4)}


def row_axes(shape: Sequence[int]) -> int:
    """How many axes at the end of a shape make up a row: as few as give 64 elements, the first axis never."""
    axes = 1
    while axes < len(shape) - 1 and prod(shape[-axes:]) < _ROW:
        axes += 1
    return axes


def quantises(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has a quantised moment; the whole tensor's shape, not that of a shard."""
    return len(shape) >= 2 and prod(shape) >= SMALL and prod(shape[-row_axes(shape) :]) >= _SHORTEST


def state_shapes(shape: Sequence[int], format: Format) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (exp_avg, exp_avg_scale) of a quantised tensor, or of a shard of one with whole rows."""
    shape = tuple(shape)
    return stored_shapes(shape[: -row_axes(shape)], shape[-row_axes(shape) :], format)


def stored_shapes(lead: tuple[int, ...], row: Sequence[int], format: Format) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (exp_avg, exp_avg_scale) where ``row`` are the axes of a row and ``lead`` those in front of it."""
    n = prod(row)
    return (*lead, *row) if format.bits == 8 else (*lead, -(-n // 2)), (*lead, -(-n // format.block))


def zero_state(parameter: Tensor, format: Format) -> dict[str, Tensor]:
    """The first moment before the first step: ``exp_avg`` and ``exp_avg_scale``, on the parameter's device."""
    codes, scale = state_shapes(parameter.shape, format)
    return {
        "exp_avg": torch.zeros(codes, dtype=format.dtype, device=parameter.device),
        "exp_avg_scale": torch.zeros(scale, dtype=format.scale_dtype, device=parameter.device),
    }


def state_bytes(shape: Sequence[int], format: Format) -> int:
    """Bytes of the first moment of a tensor that ``quantises``, scales included."""
    codes, scale = state_shapes(shape, format)
    return prod(codes) + format.scale_dtype.itemsize * prod(scale)


def format_of(exp_avg: Tensor) -> Format:
    """The format of stored codes, by their dtype."""
    return INT8 if exp_avg.dtype == torch.int8 else INT4


def quantise(m: Tensor, format: Format, *, step: int | Tensor, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Moments as codes and scales, right on average.

    Args:
        m: fp32 or float64, [*lead, n]: rows along the last axis; not changed.
        format: to be stored as.
        step: the optimizer's step, 1 at the first; an int64 tensor where it must not be waited for.
        seed: of the tensor, uint32.
        first: index of ``m``'s first block in its tensor, where it is a piece of one.

    Returns:
        (codes as stored: int8 [*lead, n] or uint8 [*lead, ceil(n / 2)]; scale [*lead, ceil(n / block)]).
    """
    n = m.shape[-1]
    blocks = _blocks(m, format.block)
    absmax = blocks.abs().amax(-1, keepdim=True)  # NaN where there is one
    scale = (absmax / format.levels**2).float()
    if format.scale_dtype == torch.bfloat16:  # up, so that no element lies above the largest code
        scale = ((scale.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    scale.masked_fill_(absmax < _TINY, 0.0).masked_fill_(~absmax.isfinite(), float("nan"))
    x = blocks.abs().mul_(scale.to(m.dtype).reciprocal())
    low = x.sqrt().floor_()
    share = x.sub_(low.square())
    up = _uniform(scale, format.block, step, seed, first).mul(low * 2 + 1) < share
    codes = low.add_(up).clamp_(max=format.levels).copysign_(blocks).masked_fill_(~(scale > 0), 0.0).to(torch.int8)
    return _packed(codes.flatten(-2)[..., :n], format), scale.squeeze(-1).to(format.scale_dtype)


def _uniform(scale: Tensor, block: int, step: int | Tensor, seed: int, first: int) -> Tensor:
    """fp32 numbers in [0, 1): [*lead, blocks, block] for scales [*lead, blocks, 1]."""
    index = torch.arange(first, first + scale.numel(), device=scale.device)
    along = torch.arange(block, device=scale.device) * 0x9E3779B9
    numbers = hashed(index, step, seed).to(torch.int32).unsqueeze(-1) + along.to(torch.int32)  # wraps around
    numbers = numbers.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return numbers.float().mul_(2.0**-24).view(*scale.shape[:-1], block)


def dequantise(codes: Tensor, scale: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The moments that codes stand for.

    Args:
        codes: as stored, rows along the last axis.
        scale: [*lead, ceil(n / block)].
        n: length of a row.
        dtype: fp32 or float64.

    Returns:
        Tensor of ``dtype``, [*lead, n].
    """
    format = format_of(codes)
    values = (codes if format.bits == 8 else _unpacked(codes, n)).to(dtype)
    values = _blocks(values, format.block)
    return (values * values.abs()).mul_(scale.to(dtype).unsqueeze(-1)).flatten(-2)[..., :n]


def _blocks(rows: Tensor, block: int) -> Tensor:
    """[*lead, n] as [*lead, ceil(n / block), block], zeros behind the end; a view where nothing is missing."""
    missing = -rows.shape[-1] % block
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).unflatten(-1, (-1, block))


def _packed(codes: Tensor, format: Format) -> Tensor:
    """int8 codes as stored: themselves, or two to a byte."""
    if format.bits == 8:
        return codes.contiguous()
    nibbles = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _unpacked(codes: Tensor, n: int) -> Tensor:
    """Bytes of two codes as int8 [..., n]."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :n]
    return (nibbles ^ 8).view(torch.int8) - 8


def advance(
    grad: Tensor, codes: Tensor, scale: Tensor, *, beta1: float, maximize: bool, step: int | Tensor, seed: int,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """The first moment of some whole rows takes a step, in place.

    Args:
        grad: gradient, fp32 (float64 for float64 parameters), [*lead, n]; not changed.
        codes: as stored, rows along the last axis; changed.
        scale: their scales, changed.
        beta1: decay of the first moment.
        maximize: ascend instead.
        step: as in ``quantise``; likewise ``seed`` and ``first``.
        seed: see there.
        first: see there.

    Returns:
        The exact new moment; dtype and shape of ``grad``.
    """
    m = dequantise(codes, scale, grad.shape[-1], grad.dtype).mul_(beta1)
    m.add_(grad * ((beta1 - 1) if maximize else (1 - beta1)))
    new_codes, new_scale = quantise(m, format_of(codes), step=step, seed=seed, first=first)
    codes.copy_(new_codes)
    scale.copy_(new_scale)
    return m


def move(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor | None, factor: Tensor, *, beta1: float,
    decay: float | Tensor, maximize: bool, step: int | Tensor, seed: int, how: str | None = None,
    compensation: Tensor | None = None, first_row: int = 0,
) -> None:  # fmt: skip
    """The step of one tensor once its second moment has moved: first moment and parameter, in place.

    Args:
        param: parameter, any shape whose rows are whole, any strides; changed.
        grad: its gradient, same shape, any strides; read only.
        exp_avg: codes as stored, or an unquantised moment of the parameter's shape; changed.
        exp_avg_scale: the codes' scales, changed; None for an unquantised moment.
        factor: step size of every element, broadcasts against ``param``: lr, bias corrections and sqrt(v) in it.
        beta1: decay of the first moment.
        decay: lr * weight_decay.
        maximize: ascend instead.
        step: the optimizer's step, 1 at the first, for the random numbers.
        seed: of the tensor, uint32, likewise.
        how: rounding of bf16 parameters, as in ``rounding.apply``.
        compensation: see there; changed.
        first_row: where the tensors are a slice of the first axis: its start, so that random numbers are the whole's.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    full = (param, grad, factor.expand_as(param), *(() if compensation is None else (compensation,)))
    if exp_avg_scale is None:
        axes, pieces = 0, _row_views((exp_avg, *full), (), ())
    else:
        axes = param.dim() - exp_avg_scale.dim() + 1
        codes, format = exp_avg.flatten(-axes) if exp_avg.dtype == torch.int8 else exp_avg, format_of(exp_avg)
        pieces = _row_views(full, (codes, exp_avg_scale), (8 // format.bits, format.block))
    first = first_row * (param.numel() // max(1, len(param))) if param.dim() else 0
    first_block = first_row * exp_avg_scale[0].numel() if exp_avg_scale is not None else 0
    for own, stored in pieces:
        if axes:
            p, g, f, *rest = own
            g = g.to(dtype).flatten(-axes)
            m = advance(g, *stored, beta1=beta1, maximize=maximize, step=step, seed=seed, first=first_block)
            u = m.view(p.shape).mul_(f)
            first_block += stored[1].numel()
        else:
            m, p, g, f, *rest = own
            exact = m.to(dtype) * beta1 + g.to(dtype) * ((beta1 - 1) if maximize else (1 - beta1))
            m.copy_(exact)
            u = m.to(dtype) * f
        apply(p, u, decay=decay, how=how, compensation=rest[0] if rest else None, step=step, seed=seed, first=first)
        first += p.numel()


_Tensors = tuple[Tensor, ...]


def _row_views(full: _Tensors, stored: _Tensors, per: tuple[int, ...]) -> Iterator[tuple[_Tensors, _Tensors]]:
    """Views of all tensors, in row-major order, of at most ``_PIECE`` elements; one row of several axes stays whole.

    Args:
        full: tensors of the parameter's shape.
        stored: codes and scales, whose rows are their last axis; or nothing.
        per: how many elements of a row one of each stands for.
    """
    one = full[0]
    leads = stored[0].dim() - 1 if stored else one.dim() - 1
    if one.numel() <= _PIECE or (leads == 0 and one.dim() > 1):
        yield full, stored
        return
    if leads and one[0].numel() >= _PIECE:
        for i in range(len(one)):
            yield from _row_views(tuple(t[i] for t in full), tuple(t[i] for t in stored), per)
        return
    size = _PIECE // one[0].numel()
    wide = [t.split(size) for t in full]
    narrow = [t.split(size if leads else size // n) for t, n in zip(stored, per, strict=True)]
    for k in range(len(wide[0])):
        yield tuple(t[k] for t in wide), tuple(t[k] for t in narrow)
