"""Conversion of first moments from the format of a checkpoint to that of the running optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from ..step import moments
from ..step.dtypes import second_moment_dtype
from .saved import Saved

_PIECE = 1 << 18  # elements converted at a time; bounds the temporary tensors


def restored(
    saved: Saved, parameter: Tensor, dtype: torch.dtype | str | None, notes: Counter[str], seed: int = 0
) -> dict[str, Tensor]:
    """Return a parameter's ``exp_avg``, and ``exp_avg_scale`` if it is quantised, as the running optimizer stores them.

    Args:
        saved: the checkpoint's state of the parameter, with checked shapes.
        parameter: the parameter.
        dtype: the optimizer's ``exp_avg_dtype``: None for the parameter's dtype, a floating-point dtype, "int8" or
            "int4".
        notes: counts each kind of cast, quantisation and dequantisation; added to.
        seed: seed of the parameter's stochastic rounding.

    Returns:
        New tensors on the parameter's device, by name.
    """
    if saved.packed and saved.scale is not None:
        pairs = (("exp_avg", saved.exp_avg), ("exp_avg_scale", saved.scale))
        return {name: x.detach().to(parameter.device, copy=True) for name, x in pairs}
    if isinstance(dtype, str):
        target = moments.FORMATS[dtype]
        if moments.quantises(parameter.shape):
            return _quantised(saved, parameter, target, notes, seed)
        dtype = second_moment_dtype(parameter)  # moments of small parameters are not quantised
    dtype = dtype or parameter.dtype
    exp_avg = saved.exp_avg.detach()
    if saved.scale is not None:
        notes[f"exp_avg dequantised from {moments.format_of(exp_avg).name} to {dtype}"] += 1
        exp_avg = plain(saved, parameter)
    elif exp_avg.dtype != dtype:
        notes[f"exp_avg cast from {exp_avg.dtype} to {dtype}"] += 1
    if hasattr(parameter, "to_local"):
        return {"exp_avg": exp_avg.to(parameter.device, dtype, copy=True)}
    new = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return {"exp_avg": new.copy_(exp_avg)}


def _quantised(
    saved: Saved, parameter: Tensor, target: moments.Format, notes: Counter[str], seed: int
) -> dict[str, Tensor]:
    """Return ``exp_avg`` as codes and ``exp_avg_scale``; codes of the same format are copied unchanged."""
    codes, scale = saved.exp_avg.detach(), saved.scale
    if scale is None or moments.format_of(codes) != target:
        source = moments.format_of(codes).name if scale is not None else codes.dtype
        notes[f"exp_avg quantised from {source} to {target.name}"] += 1
        codes, scale = quantised(plain(saved, parameter), target, saved.step, seed, saved.scales)
    return {
        "exp_avg": codes.to(parameter.device, copy=True).contiguous(),
        "exp_avg_scale": scale.detach().to(parameter.device, target.scale_dtype, copy=True).contiguous(),
    }


def plain(saved: Saved, parameter: Tensor) -> Tensor:
    """Return the first moment in floating point, in the parameter's shape.

    The result is the checkpoint's own tensor if that is not quantised, otherwise a new tensor.
    """
    codes, scale = saved.exp_avg.detach(), saved.scale
    if scale is None:
        return codes
    dtype = second_moment_dtype(parameter)
    n = _row(parameter.shape)
    rows = codes.reshape(-1, n if moments.format_of(codes).bits == 8 else codes.shape[-1])
    scales = scale.detach().to(codes.device).reshape(len(rows), -1)
    m = torch.empty(len(rows), n, dtype=dtype, device=codes.device)
    for span in row_slices(len(rows), n):
        m[span] = moments.dequantise(rows[span], scales[span], n, dtype)
    return m.reshape(parameter.shape)


def quantised(
    m: Tensor, target: moments.Format, step: float, seed: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise a first moment, with the same rounding as a step.

    Args:
        m: first moment in floating point, in the parameter's shape.
        target: the quantised format.
        step: number of steps taken.
        seed: seed of the stochastic rounding, different for each parameter.
        scales: the scale of each element, if the moment was saved by element; see ``joined``.

    Returns:
        Codes and scales in the shapes in which they are stored.
    """
    dtype = second_moment_dtype(m)
    codes_shape, scale_shape = moments.state_shapes(m.shape, target)
    rows = m.reshape(-1, _row(m.shape))
    each = None if scales is None else scales.reshape(rows.shape)
    parts = [
        joined(
            rows[span].to(dtype),
            None if each is None else each[span].to(dtype),
            target,
            step=int(step),
            seed=seed,
            first=span.start * scale_shape[-1],
        )
        for span in row_slices(*rows.shape)
    ]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.reshape(codes_shape), scales.reshape(scale_shape)


def _row(shape: torch.Size) -> int:
    """Return the number of elements of a row, which is what shares scales."""
    return shape[-moments.row_axes(shape) :].numel()


def row_slices(rows: int, n: int) -> Iterator[slice]:
    """Return slices that cover ``rows`` rows of ``n`` elements, of at most ``_PIECE`` elements or one row each."""
    count = max(1, _PIECE // n)
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))


def spread(codes: Tensor, scale: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a quantised first moment with one value and one scale per element, without loss.

    Args:
        codes: codes as stored, rows along the last axis.
        scale: their scales.
        n: number of elements of a row.
        dtype: dtype of the results, fp32 or float64.

    Returns:
        Values and scales, both [*lead, n].
    """
    block = moments.format_of(codes).block
    return moments.dequantise(codes, scale, n, dtype), scale.to(dtype).repeat_interleave(block, -1)[..., :n]


def joined(
    values: Tensor, scales: Tensor | None, target: moments.Format, *, step: int, seed: int, first: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Quantise rows, but take over the codes of every block whose elements have one scale: the inverse of ``spread``.

    Args:
        values: first moment, fp32 or float64, [*lead, n].
        scales: scale of each element, same shape; None if the moment was not quantised.
        target: the format.
        step: number of steps taken, for the rounding of blocks that were not quantised together.
        seed: seed of that rounding.
        first: index of the first block, or of all blocks, for that rounding; see ``moments.quantise``.

    Returns:
        Codes and scales as they are stored.
    """
    codes, scale = moments.quantise(values, target, step=step, seed=seed, first=first)
    if scales is None or not values.numel():
        return codes, scale
    n = values.shape[-1]
    missing = -n % target.block

    def blocks(rows: Tensor) -> Tensor:
        """Divide rows into blocks. The last block is filled with copies of the row's last value."""
        filled = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], missing)], -1)
        return filled.unflatten(-1, (-1, target.block))

    scales, values = blocks(scales), blocks(values)
    of_block = scales[..., :1]
    same = ((scales == of_block) | (scales.isnan() & of_block.isnan())).all(-1, keepdim=True)
    old = (values.abs() / of_block).sqrt().round().nan_to_num(0.0, 0.0, 0.0).copysign(values)
    same &= (old.abs() <= target.levels).all(-1, keepdim=True)
    kept = torch.where(same, old, blocks(moments.unpacked(codes, n)).to(old)).flatten(-2)[..., :n]
    new_scale = torch.where(same, of_block, scale.to(old).unsqueeze(-1)).squeeze(-1)
    return moments.packed(kept.to(torch.int8), target), new_scale.to(target.scale_dtype)
