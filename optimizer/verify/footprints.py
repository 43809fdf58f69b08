"""What each output unit of a projection is, from the gradient of what the attention puts out.

Let z be what the output projection takes in (the heads, one behind the other) and y what a projection puts out. The
footprint of a unit of y is the set of features of z it moves, and its reach is at which positions:

    query   moves z at its own position only, over the whole width of its head
    key     moves z at other positions too, over the whole width of the heads that read it
    value   moves z at other positions too, one feature in each of the heads that read it
    gate    moves z at its own position only, one feature (or one head, with one unit for each head)

Units of one footprint and kind are a head. Exact zeros decide, never a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 64
_ZERO = 1e-9  # relative to the largest gradient: what a unit does not reach is zero exactly


@dataclass(frozen=True)
class Footprints:
    """The evidence on one projection.

    Attributes:
        moves: bool [units, features of z].
        elsewhere: bool [units], whether z moves at a position other than the unit's own; None where positions of y and
            z cannot be compared.
    """

    moves: Tensor
    elsewhere: Tensor | None

    @property
    def groups(self) -> Tensor:
        """int64 [units]: equal where kind and footprint are; -1 where a unit moves nothing."""
        reach = self.elsewhere if self.elsewhere is not None else torch.zeros(len(self.moves), dtype=torch.bool)
        keys = torch.cat([self.moves, reach[:, None]], dim=1)
        ids = torch.unique(keys, dim=0, return_inverse=True)[1]
        return torch.where(self.moves.any(1), ids, -1)


def footprints(z: Tensor, leaves: Mapping[str, Tensor], feature_axis: Mapping[str, int]) -> dict[str, Footprints]:
    """Footprints of every leaf that z depends on.

    Args:
        z: [..., features], with a graph.
        leaves: name -> cut output of a projection.
        feature_axis: name -> the axis of its units.

    Returns:
        name -> ``Footprints``; leaves that z does not depend on are left out.
    """
    flat = z.reshape(-1, z.shape[-1])
    position = len(flat) - 1  # the last one sees every other one, under a causal mask too
    rows = flat[position]
    names = list(leaves)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for i in range(len(part)):
            grads = torch.autograd.grad(part[i], [leaves[n] for n in names], retain_graph=True, allow_unused=True)
            for name, g in zip(names, grads, strict=True):
                if g is not None:
                    units_last = g.movedim(feature_axis[name], -1)
                    found[name].append(units_last.reshape(-1, units_last.shape[-1]).abs())
    out = {}
    for name, slices in found.items():
        if slices:
            out[name] = _footprints(torch.stack(slices), position, len(flat))
    return out


def _footprints(gradient: Tensor, position: int, positions: int) -> Footprints:
    """From |dz/dy|, [features of z, positions of y, units]."""
    largest = gradient.max()
    nonzero = gradient > _ZERO * largest if largest > 0 else torch.zeros_like(gradient, dtype=torch.bool)
    moves = nonzero.any(1).T
    if gradient.shape[1] != positions:
        return Footprints(moves, None)
    others = torch.arange(positions) != position
    return Footprints(moves, nonzero[:, others].any(1).any(0))
