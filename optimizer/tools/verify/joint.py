"""Footprints of ``nn.MultiheadAttention``, whose projections are weights without a module to watch.

A weight's gradient is the sum over positions of (what its output's gradient is there) x (what it took in there). The
inputs are known and independent, so the output's gradient at each position follows from least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .footprints import Footprints, footprint

_ROUNDING = 1e-5  # relative: least squares in float64 on float32 gradients


def open_output(module: nn.MultiheadAttention) -> None:
    """Make the output projection the identity, so that what comes out are the heads, one behind the other.

    Smaller projections keep the softmax from settling on one position, whose neighbours would drown in rounding.
    """
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(module.embed_dim))
        if module.out_proj.bias is not None:
            module.out_proj.bias.zero_()
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if isinstance(getattr(module, name), nn.Parameter):
            getattr(module, name).requires_grad_()
            with torch.no_grad():
                getattr(module, name).mul_(0.1)


def joint_footprints(
    module: nn.MultiheadAttention, given: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> dict[str, Footprints]:
    """Name of the weight -> footprints of its rows."""
    width = module.embed_dim
    sources = dict(zip("qkv", given, strict=True))
    if isinstance(module.in_proj_weight, nn.Parameter):
        weights = {"in_proj_weight": (module.in_proj_weight, "qkv")}
    else:
        weights = {f"{k}_proj_weight": (getattr(module, f"{k}_proj_weight"), k) for k in "qkv"}
    flat = output.reshape(-1, width)
    position = len(flat) - 1
    if not flat.requires_grad:
        return {}
    gradients = [
        torch.autograd.grad(flat[position, c], [w for w, _ in weights.values()], retain_graph=True)
        for c in range(width)
    ]
    out = {}
    for i, (name, (_, kinds)) in enumerate(weights.items()):
        whole = torch.stack([g[i] for g in gradients])  # [features of z, rows, in]
        pieces = whole.chunk(len(kinds), dim=1)
        solved = [_at_positions(piece, sources[kind]) for piece, kind in zip(pieces, kinds, strict=True)]
        out[name] = _joined(solved, position, len(flat))
    return out


def _at_positions(piece: Tensor, source: Tensor) -> Tensor:
    """|gradient| of the output at each position, [features of z, rows, positions]."""
    taken = source.reshape(-1, source.shape[-1]).double()  # [positions, in]
    features, rows, width = piece.shape
    right = piece.double().reshape(-1, width).T
    return torch.linalg.lstsq(taken.T, right).solution.T.reshape(features, rows, -1).abs()


def _joined(solved: list[Tensor], position: int, positions: int) -> Footprints:
    """One ``Footprints`` for the parts of a fused weight."""
    parts = []
    crossed = any(s.shape[-1] != positions for s in solved)
    for s in solved:
        # A row that is not moved is zero exactly; positions of one that is moved get each other's rounding.
        exact = torch.where(s > _ROUNDING * s.amax(2, keepdim=True), s, 0.0)
        parts.append(footprint(exact.transpose(1, 2), position, positions, crossed=crossed))
    reach = [part.elsewhere for part in parts if part.elsewhere is not None]
    return Footprints(torch.cat([part.moves for part in parts]), torch.cat(reach) if len(reach) == len(parts) else None)
