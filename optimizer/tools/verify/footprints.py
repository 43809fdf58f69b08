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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNK = 64


@dataclass(frozen=True)
class Footprints:
    """The evidence on one projection.

    Attributes:
        moves: bool [units, features of z].
        elsewhere: bool [units], whether z moves at a position other than the unit's own; None where positions of y and
            z cannot be compared.
        coupled: whether two units act together, from the mixed second derivative: two softmaxes over the same features
            of z add up, and what adds up is not one head. None where it cannot be asked.
    """

    moves: Tensor
    elsewhere: Tensor | None
    coupled: Callable[[int, int], bool] | None = None

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
    stacks = {name: torch.stack(slices) for name, slices in found.items() if slices}
    return {
        name: replace(footprint(stack, position, len(flat)), coupled=_coupling(rows, leaves[name], feature_axis[name]))
        for name, stack in stacks.items()
    }


def _coupling(outcome: Tensor, leaf: Tensor, axis: int) -> Callable[[int, int], bool]:
    """The mixed second derivative of a fixed mixture of the outcome, as a question about two units."""
    mixture = torch.linspace(1.0, 2.0, len(outcome), dtype=outcome.dtype)

    def coupled(first: int, second: int) -> bool:
        gradient = torch.autograd.grad(outcome @ mixture, leaf, create_graph=True)[0].movedim(axis, -1)
        if not gradient.requires_grad:
            return False
        mixed = torch.autograd.grad(gradient[..., first].sum(), leaf, retain_graph=True, allow_unused=True)[0]
        return mixed is not None and bool((mixed.movedim(axis, -1)[..., second] != 0).any())

    return coupled


def footprint(gradient: Tensor, position: int, positions: int, *, crossed: bool = False) -> Footprints:
    """Footprints of one projection.

    Args:
        gradient: abs(dz/dy), [features of z, positions of y, units].
        position: the position of z looked at.
        positions: how many z has.
        crossed: whether a projection at other positions than z's is known to be on the other side of a cross
            attention, where a unit that counts at more than one position is no query.
    """
    nonzero = gradient > 0  # what a unit does not reach is zero exactly, and a fading memory reaches far
    moves = nonzero.any(1).T
    if gradient.shape[1] != positions:
        return Footprints(moves, nonzero.any(0).sum(0) > 1 if crossed else None)
    if positions == 1 and not crossed:
        return Footprints(moves, None)  # there is no elsewhere
    others = torch.arange(positions) != position
    return Footprints(moves, nonzero[:, others].any(1).any(0))
