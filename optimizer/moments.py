r"""First moments in eight or four bits a value: the specification, in eager torch operations.

**What is stored.** A *row* is the shortest tail of a tensor's axes that holds at least 64 elements; the first axis is
never part of it. So a row is the last axis of nearly every weight, and (in, height, width) of a convolution's. Rows are
cut into blocks of ``block`` elements (the last one may be shorter); a block has one scale. With ``lead`` the axes in
front of the row and ``n`` the row's length:

    ===============  ==========================================  =============================================
    state            int8 (block 128)                            int4 (block 64)
    ===============  ==========================================  =============================================
    exp_avg          int8, the parameter's shape                 uint8 [*lead, ceil(n / 2)], low nibble first,
                                                                 two's complement, a spare nibble is 0
    exp_avg_scale    fp32 [*lead, ceil(n / 128)]                 fp32 [*lead, ceil(n / 64)]
    ===============  ==========================================  =============================================

All state of a fresh tensor is zero bytes. Two rows never share a scale: a tensor cut along an axis of ``lead`` has its
codes and scales cut alike. Both are contiguous whatever the parameter's strides are.

**What a code means.** Codes follow a square law, with ``c`` in -127..127 or -7..7::

    value(c) = (c * |c|) * scale

**How a block is quantised**, in T, each operation rounded on its own (T: fp32; float64 for float64 parameters)::

    absmax = max |m_i|
    absmax NaN or infinite:   scale = NaN, codes = 0      (the block stays NaN: nothing vanishes silently)
    absmax < 2^-100:          scale = 0,   codes = 0
    otherwise:                scale = fp32(absmax / levels^2)           levels = 127 or 7
                              x_i   = |m_i| * (1 / scale)
                              c_i   = sign(m_i) * min(levels, rint(sqrt(max(x_i - 0.25, 0))))

``rint`` rounds to the nearest, ties to even. A code's borders lie where (c + 1/2)^2 = x - 1/4, half-way between the
values c^2 and (c + 1)^2: the nearest value is taken, not the nearest root.

**How a tensor takes a step**, with ``factor`` = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) from the
second moment, ``keep`` = 1 - lr * weight_decay, ``carry`` = beta1 / (1 - beta1); scalars are computed in double and
rounded to T once, operations are rounded one by one (no fused multiply-add)::

    m      = beta1 * value(codes, scale) + (1 - beta1) * g          g in T; -g to maximise
    codes, scale = quantise(m)
    lost   = m - value(codes, scale)
    param  = keep * param - factor * (m + carry * lost)

Rounding takes ``lost`` from the moment, and with it ``factor * beta1^k * lost`` from the parameter in step k after:
``factor * carry * lost`` altogether. The parameter gets that sum at once. So whatever rounding does, ``param - factor *
carry * value(codes)`` moves by exactly ``-factor * g``, as it does with exact momentum: no error piles up, none needs
memory, and rounding to nearest, which alone would freeze small moments (0.9 of one code rounds to one code), is
enough. This is error feedback (Seide et al., INTERSPEECH 2014; Karimireddy et al., arXiv 1901.09847), with the weights
as the accumulator. It needs no random numbers.

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

from .rounding import apply

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
    """

    name: str
    bits: int
    block: int

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes as they are stored."""
        return torch.int8 if self.bits == 8 else torch.uint8


INT8, INT4 = Format("int8", 8, 128), Format("int4", 4, 64)
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
    lead, n = shape[: -row_axes(shape)], prod(shape[-row_axes(shape) :])
    return shape if format.bits == 8 else (*lead, -(-n // 2)), (*lead, -(-n // format.block))


def zero_state(parameter: Tensor, format: Format) -> dict[str, Tensor]:
    """The first moment before the first step: ``exp_avg`` and ``exp_avg_scale``, on the parameter's device."""
    codes, scale = state_shapes(parameter.shape, format)
    return {
        "exp_avg": torch.zeros(codes, dtype=format.dtype, device=parameter.device),
        "exp_avg_scale": torch.zeros(scale, dtype=torch.float32, device=parameter.device),
    }


def state_bytes(shape: Sequence[int], format: Format) -> int:
    """Bytes of the first moment of a tensor that ``quantises``, scales included."""
    codes, scale = state_shapes(shape, format)
    return prod(codes) + 4 * prod(scale)


def format_of(exp_avg: Tensor) -> Format:
    """The format of stored codes, by their dtype."""
    return INT8 if exp_avg.dtype == torch.int8 else INT4


def quantise(m: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Moments as codes and scales.

    Args:
        m: fp32 or float64, [*lead, n]: rows along the last axis; not changed.
        format: to be stored as.

    Returns:
        (codes as stored: int8 [*lead, n] or uint8 [*lead, ceil(n / 2)]; scale, fp32 [*lead, ceil(n / block)]).
    """
    n = m.shape[-1]
    blocks = _blocks(m, format.block)
    absmax = blocks.abs().amax(-1, keepdim=True)  # NaN where there is one
    scale = (absmax / format.levels**2).float()
    scale.masked_fill_(absmax < _TINY, 0.0).masked_fill_(~absmax.isfinite(), float("nan"))
    inverse = scale.to(m.dtype).reciprocal()
    roots = (blocks.abs() * inverse).sub_(0.25).clamp_(min=0).sqrt_().round_().clamp_(max=format.levels)
    codes = roots.copysign_(blocks).masked_fill_(~(scale > 0), 0.0).to(torch.int8)
    return _packed(codes.flatten(-2)[..., :n], format), scale.squeeze(-1)


def dequantise(codes: Tensor, scale: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The moments that codes stand for.

    Args:
        codes: as stored, rows along the last axis.
        scale: fp32, [*lead, ceil(n / block)].
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


def advance(grad: Tensor, codes: Tensor, scale: Tensor, *, beta1: float, maximize: bool) -> Tensor:
    """The first moment of some whole rows takes a step, in place; what the parameter has to move by comes back.

    Args:
        grad: gradient, fp32 (float64 for float64 parameters), [*lead, n]; not changed.
        codes: as stored, rows along the last axis; changed.
        scale: their scales, changed.
        beta1: decay of the first moment.
        maximize: ascend instead.

    Returns:
        The exact new moment plus ``beta1 / (1 - beta1)`` times what rounding took from it; dtype and shape of ``grad``.
    """
    n = grad.shape[-1]
    m = dequantise(codes, scale, n, grad.dtype).mul_(beta1)
    m.add_(grad * ((beta1 - 1) if maximize else (1 - beta1)))
    new_codes, new_scale = quantise(m, format_of(codes))
    codes.copy_(new_codes)
    scale.copy_(new_scale)
    lost = m - dequantise(codes, scale, n, grad.dtype)
    return m.add_(lost.mul_(beta1 / (1 - beta1)))


def move(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, factor: Tensor, *, beta1: float,
    decay: float | Tensor, maximize: bool, how: str | None = None, compensation: Tensor | None = None, step: int = 0,
    seed: int = 0,
) -> None:  # fmt: skip
    """The step of one tensor once its second moment has moved: first moment and parameter, in place.

    Args:
        param: parameter, any shape whose rows are whole, any strides; changed.
        grad: its gradient, same shape, any strides; read only.
        exp_avg: codes as stored, changed.
        exp_avg_scale: their scales, changed.
        factor: step size of every element, broadcasts against ``param``: lr, bias corrections and sqrt(v) in it.
        beta1: decay of the first moment.
        decay: lr * weight_decay.
        maximize: ascend instead.
        how: rounding of bf16 parameters, as in ``rounding.apply``; likewise ``compensation``, ``step`` and ``seed``.
        compensation: see there; changed.
        step: see there.
        seed: see there.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    axes = param.dim() - exp_avg_scale.dim() + 1
    codes = exp_avg.flatten(-axes) if exp_avg.dtype == torch.int8 else exp_avg
    full = (param, grad, factor.expand_as(param), *(() if compensation is None else (compensation,)))
    first = 0
    for c, s, p, g, f, *rest in _pieces(codes, exp_avg_scale, *full):
        u = advance(g.to(dtype).flatten(-axes), c, s, beta1=beta1, maximize=maximize).view(p.shape).mul_(f)
        apply(p, u, decay=decay, how=how, compensation=rest[0] if rest else None, step=step, seed=seed, first=first)
        first += p.numel()


def _pieces(codes: Tensor, scale: Tensor, *full: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of all tensors, in row-major order, of at most ``_PIECE`` elements; one row of several axes stays whole."""
    one, leads = full[0], scale.dim() - 1
    if one.numel() <= _PIECE or (leads == 0 and one.dim() > 1):
        yield codes, scale, *full
    elif leads and one[0].numel() >= _PIECE:
        for inner in zip(codes, scale, *full, strict=True):
            yield from _pieces(*inner)
    elif leads:
        rows = _PIECE // one[0].numel()
        yield from zip(*(t.split(rows) for t in (codes, scale, *full)), strict=True)
    else:  # whole blocks of one long row
        format = format_of(codes)
        sizes = (_PIECE * format.bits // 8, _PIECE // format.block, *(_PIECE for _ in full))
        yield from zip(*(t.split(size) for t, size in zip((codes, scale, *full), sizes, strict=True)), strict=True)
