"""Where a shard lies in its whole tensor, so that random rounding uses the numbers of the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rounding import INCREMENT, PARAMETER_STREAM

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Place:
    """The place of a shard's elements in the whole tensor. Rows are those of ``moments``: they share scales.

    Attributes:
        shape: shape of the whole tensor, which decides whether its first moment is quantised.
        n: number of elements of a row of the whole tensor.
        row: row of the whole tensor in which the shard begins.
        offset: index in that row of the shard's first element.
        rows: row of the whole tensor of each of the shard's rows, int64, if they are whole and not all neighbours. If
            None, blocks and elements are counted on from the first one. That is exact for neighbouring whole rows. For
            rows that are cut, the numbers are as random, but not those of the whole tensor.
    """

    shape: tuple[int, ...]
    n: int
    row: int = 0
    offset: int = 0
    rows: Tensor | None = None

    def moved(self, rows: int) -> Place:
        """Return the place of the part of the shard that begins this number of rows later."""
        if self.rows is None:
            return replace(self, row=self.row + rows)
        rest = self.rows[rows:]
        return replace(self, row=int(rest[0]) if len(rest) else 0, rows=rest)

    def elements(self, start: int, count: int, device: torch.device) -> int | Tensor:
        """Return the indices of elements in the whole tensor: the first one if they are neighbours.

        Args:
            start: row-major index of the first element in the shard.
            count: number of elements.
            device: device of the result.
        """
        return self._indices(start, count, self.n, self.row * self.n + self.offset, device)

    def blocks(self, start: int, count: int, size: int, device: torch.device) -> int | Tensor:
        """Return the indices of blocks in the whole tensor: the first one if they are neighbours.

        Args:
            start: row-major index of the first block in the shard.
            count: number of blocks.
            size: number of elements of a block.
            device: device of the result.
        """
        return self._indices(start, count, -(-self.n // size), self._first_block(size), device)

    def streams(self, seed: int, size: int) -> tuple[int, int] | None:
        """Return seeds with which a count from zero gives the numbers of this place; None if no seeds do.

        Args:
            seed: the tensor's seed, uint32.
            size: number of elements of a block.

        Returns:
            (seed of blocks, seed of elements), both uint32.
        """
        if self.rows is not None:
            return None
        first = self.row * self.n + self.offset
        blocks, elements = seed + self._first_block(size) * INCREMENT, (seed ^ PARAMETER_STREAM) + first * INCREMENT
        return blocks & _MASK, elements & _MASK

    def _first_block(self, size: int) -> int:
        return self.row * -(-self.n // size) + self.offset // size

    def _indices(self, start: int, count: int, per_row: int, first: int, device: torch.device) -> int | Tensor:
        """Return the first of ``count`` neighbouring indices, or all of them if there are ``rows``."""
        if self.rows is None:
            return first + start
        local = torch.arange(start, start + count, device=device)
        return self.rows.to(device)[local // per_row] * per_row + local % per_row
