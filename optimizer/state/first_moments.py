"""First moments from the form a checkpoint has them in to the one the running optimizer keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from ..step import moments
from ..step.dtypes import second_moment_dtype
from .saved import Saved

_PIECE = 1 << 18  # elements worked on at once


def restored(
    saved: Saved, parameter: Tensor, dtype: torch.dtype | str | None, notes: Counter[str], seed: int = 0
) -> dict[str, Tensor]:
    """``exp_avg``, and ``exp_avg_scale`` where it is quantised, in new tensors on the parameter's device.

    Args:
        saved: the checkpoint's state, shapes checked.
        parameter: whose moment it is.
        dtype: the optimizer's ``exp_avg_dtype``: None for the parameter's, a floating-point dtype, "int8" or "int4".
        notes: says what was cast, quantised or dequantised, and how often.
        seed: of the tensor, for rounding to codes.
    """
    if isinstance(dtype, str):
        kept = moments.FORMATS[dtype]
        if moments.quantises(parameter.shape):
            return _quantised(saved, parameter, kept, notes, seed)
        dtype = second_moment_dtype(parameter)  # small ones stay plain
    dtype = dtype or parameter.dtype
    given = saved.exp_avg.detach()
    if saved.scale is not None:
        notes[f"exp_avg dequantised from {moments.format_of(given).name} to {dtype}"] += 1
        given = plain(saved, parameter)
    elif given.dtype != dtype:
        notes[f"exp_avg cast from {given.dtype} to {dtype}"] += 1
    if hasattr(parameter, "to_local"):
        return {"exp_avg": given.to(parameter.device, dtype, copy=True)}
    kept_like = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return {"exp_avg": kept_like.copy_(given)}


def _quantised(
    saved: Saved, parameter: Tensor, kept: moments.Format, notes: Counter[str], seed: int
) -> dict[str, Tensor]:
    codes, scale = saved.exp_avg.detach(), saved.scale
    if scale is None or moments.format_of(codes) != kept:
        of = moments.format_of(codes).name if scale is not None else codes.dtype
        notes[f"exp_avg quantised from {of} to {kept.name}"] += 1
        codes, scale = quantised(plain(saved, parameter), kept, saved.step, seed)
    return {
        "exp_avg": codes.to(parameter.device, copy=True).contiguous(),
        "exp_avg_scale": scale.detach().to(parameter.device, kept.scale_dtype, copy=True).contiguous(),
    }


def plain(saved: Saved, parameter: Tensor) -> Tensor:
    """The first moment in floating point, the parameter's shape; the checkpoint's own tensor where it is that."""
    codes, scale = saved.exp_avg.detach(), saved.scale
    if scale is None:
        return codes
    dtype = second_moment_dtype(parameter)
    n = _row(parameter.shape)
    rows = codes.reshape(-1, n if moments.format_of(codes).bits == 8 else codes.shape[-1])
    scales = scale.detach().to(codes.device).reshape(len(rows), -1)
    m = torch.empty(len(rows), n, dtype=dtype, device=codes.device)
    for here in _row_slices(len(rows), n):
        m[here] = moments.dequantise(rows[here], scales[here], n, dtype)
    return m.reshape(parameter.shape)


def quantised(m: Tensor, kept: moments.Format, step: float, seed: int) -> tuple[Tensor, Tensor]:
    """A first moment in floating point as codes and scales in their stored shapes, rounded as the step rounds.

    Args:
        m: first moment, the parameter's shape.
        kept: the format.
        step: steps taken.
        seed: makes tensors round independently.
    """
    dtype = second_moment_dtype(m)
    codes_shape, scale_shape = moments.state_shapes(m.shape, kept)
    rows = m.reshape(-1, _row(m.shape))
    parts = [
        moments.quantise(rows[here].to(dtype), kept, step=int(step), seed=seed, first=here.start * scale_shape[-1])
        for here in _row_slices(*rows.shape)
    ]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.reshape(codes_shape), scales.reshape(scale_shape)


def _row(shape: torch.Size) -> int:
    return shape[-moments.row_axes(shape) :].numel()


def _row_slices(rows: int, n: int) -> Iterator[slice]:
    """Slices of rows of ``n`` elements that keep temporaries small."""
    count = max(1, _PIECE // n)
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))
