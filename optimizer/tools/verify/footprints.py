"""Classify the output units of a projection by gradients of the attention's output.

Let z be the input of the output projection, which is the concatenation of the heads, and let y be the output of another
projection. A unit of y *moves* a feature of z if the derivative is not zero. The footprint of a unit is the set of
features of z that it moves. Together with the positions at which it moves them, the footprint identifies the unit:

    query   moves z at its own position only, over the whole width of its head
    key     moves z at other positions too, over the whole width of the heads that use it
    value   moves z at other positions too, one feature in each of the heads that use it
    gate    moves z at its own position only, one feature (or one head, if there is one unit for each head)

Units with equal footprints and positions form a head. Only whether a derivative is exactly zero counts, not its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNK = 64


@dataclass(frozen=True)
class Footprints:
    """The evidence on one projection.

    Attributes:
        moves: whether a unit moves a feature of z; bool [units, features of z].
        elsewhere: whether a unit moves z at a position other than its own; bool [units]. None if the positions of y and
            z cannot be compared.
        coupled: function that returns whether the mixed second derivative of z by two units is nonzero. Units of one
            head are coupled. Units of two softmaxes whose results are added have the same footprint and are not
            coupled. None if second derivatives are not available.
    """

    moves: Tensor
    elsewhere: Tensor | None
    coupled: Callable[[int, int], bool] | None = None

    @property
    def groups(self) -> Tensor:
        """Group of every unit, int64 [units]. Units of a group have equal evidence; -1 if a unit moves nothing."""
        reach = self.elsewhere if self.elsewhere is not None else torch.zeros(len(self.moves), dtype=torch.bool)
        keys = torch.cat([self.moves, reach[:, None]], dim=1)
        ids = torch.unique(keys, dim=0, return_inverse=True)[1]
        return torch.where(self.moves.any(1), ids, -1)


def footprints(z: Tensor, leaves: Mapping[str, Tensor], feature_axis: Mapping[str, int]) -> dict[str, Footprints]:
    """Compute the footprints of every projection that z depends on.

    Args:
        z: input of the output projection, [..., features], with a graph.
        leaves: name -> output of a projection, as a leaf of the graph.
        feature_axis: name -> axis of the projection's units in that output.

    Returns:
        name -> ``Footprints``, without the projections that z does not depend on.
    """
    flat = z.reshape(-1, z.shape[-1])
    position = len(flat) - 1  # The last position attends to all others, even under a causal mask.
    rows = flat[position]
    names = list(leaves)
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for i in range(len(part)):
            grads = torch.autograd.grad(part[i], [leaves[n] for n in names], retain_graph=True, allow_unused=True)
            for name, g in zip(names, grads, strict=True):
                if g is not None:
                    units_last = g.movedim(feature_axis[name], -1)
                    gradients[name].append(units_last.reshape(-1, units_last.shape[-1]).abs())
    stacks = {name: torch.stack(slices) for name, slices in gradients.items() if slices}
    return {
        name: replace(footprint(stack, position, len(flat)), coupled=_coupling(rows, leaves[name], feature_axis[name]))
        for name, stack in stacks.items()
    }


def _coupling(z_row: Tensor, leaf: Tensor, axis: int) -> Callable[[int, int], bool]:
    """Return a function that tests whether the mixed second derivative of z by two units is nonzero.

    Args:
        z_row: z at one position, [features]. Derivatives are those of a fixed weighted sum of these features.
        leaf: output of the projection that the units belong to.
        axis: axis of the units in ``leaf``.
    """
    weights = torch.linspace(1.0, 2.0, len(z_row), dtype=z_row.dtype)

    def coupled(first: int, second: int) -> bool:
        gradient = torch.autograd.grad(z_row @ weights, leaf, create_graph=True)[0].movedim(axis, -1)
        if not gradient.requires_grad:
            return False
        mixed = torch.autograd.grad(gradient[..., first].sum(), leaf, retain_graph=True, allow_unused=True)[0]
        return mixed is not None and bool((mixed.movedim(axis, -1)[..., second] != 0).any())

    return coupled


def footprint(gradient: Tensor, position: int, positions: int, *, crossed: bool = False) -> Footprints:
    """Compute the footprints of one projection.

    Args:
        gradient: abs(dz/dy) at one position of z, [features of z, positions of y, units].
        position: that position of z.
        positions: number of positions of z.
        crossed: whether a projection with another number of positions than z is the key or value side of a cross
            attention. A unit that moves z from more than one position is then no query.
    """
    # No threshold: the gradient is exactly zero where z does not depend on a unit, and a decaying memory such as a
    # linear attention's makes true dependencies very small.
    nonzero = gradient > 0
    moves = nonzero.any(1).T
    if gradient.shape[1] != positions:
        return Footprints(moves, nonzero.any(0).sum(0) > 1 if crossed else None)
    if positions == 1 and not crossed:
        return Footprints(moves, None)  # There is only one position.
    others = torch.arange(positions) != position
    return Footprints(moves, nonzero[:, others].any(1).any(0))
