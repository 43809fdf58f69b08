"""Footprints of ``nn.MultiheadAttention``, whose input projections are plain weights, not modules.

The gradient of a weight is the sum over positions of (gradient of the projection's output) x (input), an outer product.
The inputs are known and linearly independent, so least squares gives the output's gradient at each position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .footprints import Footprints, footprint

_ROUNDING = 1e-5  # relative error of least squares in float64 on gradients in float32


def open_output(module: nn.MultiheadAttention) -> None:
    """Make the output projection the identity, so that the module's output is the concatenation of its heads.

    The input projections are scaled by 0.1. Otherwise the softmax could saturate at one position, and the gradients at
    all other positions would be smaller than rounding errors.
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
    module: nn.MultiheadAttention, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> dict[str, Footprints]:
    """Compute the footprints of the rows of the module's projection weights.

    Args:
        module: the attention, prepared by ``open_output``.
        inputs: its query, key and value inputs, features last.
        output: its output, features last, with a graph.

    Returns:
        name of the weight in the module -> footprints of its rows. Empty if the output has no graph.
    """
    width = module.embed_dim
    sources = dict(zip("qkv", inputs, strict=True))
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
        chunks = whole.chunk(len(kinds), dim=1)
        per_part = [_output_gradients(chunk, sources[kind]) for chunk, kind in zip(chunks, kinds, strict=True)]
        out[name] = _joined(per_part, position, len(flat))
    return out


def _output_gradients(weight_gradients: Tensor, source: Tensor) -> Tensor:
    """Solve for the gradients of a projection's output.

    Args:
        weight_gradients: gradients of every feature of z with respect to the weight, [features of z, rows, in].
        source: the input of the projection, [..., in].

    Returns:
        Absolute gradients of every feature of z with respect to the output, [features of z, rows, positions].
    """
    inputs = source.reshape(-1, source.shape[-1]).double()  # [positions, in]
    features, rows, width = weight_gradients.shape
    right = weight_gradients.double().reshape(-1, width).T
    return torch.linalg.lstsq(inputs.T, right).solution.T.reshape(features, rows, -1).abs()


def _joined(gradients: list[Tensor], position: int, positions: int) -> Footprints:
    """Return one ``Footprints`` for all parts of a weight, in the order of its rows.

    Args:
        gradients: absolute gradients of each part's output, [features of z, rows, positions].
        position: position of z at which the gradients were computed.
        positions: number of positions of z.
    """
    parts = []
    crossed = any(gradient.shape[-1] != positions for gradient in gradients)
    for gradient in gradients:
        # Least squares mixes the rounding errors of the positions of a row, so values at that level are set to zero.
        # The gradient of a row that z does not depend on is exactly zero at all positions.
        exact = torch.where(gradient > _ROUNDING * gradient.amax(2, keepdim=True), gradient, 0.0)
        parts.append(footprint(exact.transpose(1, 2), position, positions, crossed=crossed))
    reach = [part.elsewhere for part in parts if part.elsewhere is not None]
    return Footprints(torch.cat([part.moves for part in parts]), torch.cat(reach) if len(reach) == len(parts) else None)
