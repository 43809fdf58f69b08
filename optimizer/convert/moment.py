"""First moments from the form a checkpoint has them in to the one the running optimizer keeps."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .. import moments
from .states import Saved


def restored(
    saved: Saved, parameter: Tensor, dtype: torch.dtype | str | None, notes: Counter[str]
) -> dict[str, Tensor]:
    """``exp_avg``, and ``exp_avg_scale`` where it is quantised, in new tensors on the parameter's device.

    Args:
        saved: the checkpoint's state, shapes checked.
        parameter: whose moment it is.
        dtype: the optimizer's ``exp_avg_dtype``: None for the parameter's, a floating-point dtype, "int8" or "int4".
        notes: says what was cast, quantised or dequantised, and how often.
    """
    if isinstance(dtype, str):
        kept = moments.FORMATS[dtype]
        if moments.quantises(parameter.shape):
            return _quantised(saved, parameter, kept, notes)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32  # small ones stay plain
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


def _quantised(saved: Saved, parameter: Tensor, kept: moments.Format, notes: Counter[str]) -> dict[str, Tensor]:
    codes, scale = saved.exp_avg.detach(), saved.scale
    if scale is None or moments.format_of(codes) != kept:
        of = moments.format_of(codes).name if scale is not None else codes.dtype
        notes[f"exp_avg quantised from {of} to {kept.name}"] += 1
        codes, scale = quantised(plain(saved, parameter), kept)
    return {
        "exp_avg": codes.to(parameter.device, copy=True).contiguous(),
        "exp_avg_scale": scale.detach().to(parameter.device, torch.float32, copy=True).contiguous(),
    }


def plain(saved: Saved, parameter: Tensor) -> Tensor:
    """The first moment in floating point, the parameter's shape; the checkpoint's own tensor where it is that."""
    if saved.scale is None:
        return saved.exp_avg.detach()
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    axes = moments.row_axes(parameter.shape)
    codes = saved.exp_avg.detach()
    rows = codes.flatten(-axes) if moments.format_of(codes).bits == 8 else codes
    n = parameter.shape[-axes:].numel()
    return moments.dequantise(rows, saved.scale.detach().to(codes.device), n, dtype).reshape(parameter.shape)


def quantised(m: Tensor, kept: moments.Format) -> tuple[Tensor, Tensor]:
    """(codes in their stored shape, scales) of a first moment in floating point."""
    dtype = torch.float64 if m.dtype == torch.float64 else torch.float32
    codes, scale = moments.quantise(m.to(dtype).flatten(-moments.row_axes(m.shape)), kept)
    return codes.reshape(moments.state_shapes(m.shape, kept)[0]), scale
