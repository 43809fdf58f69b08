"""Which indices of one axis each rank holds, from how the axis is dealt out over a mesh."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from ..partition.layout import Runs

Ranges = tuple[tuple[int, int], ...]
"""Ascending, disjoint, non-empty [start, stop)."""


@dataclass(frozen=True)
class Deal:
    """One mesh dimension's share in cutting an axis.

    Attributes:
        ways: ranks along the mesh dimension.
        split: split factor of a strided shard, 1 for an ordinary one.
    """

    ways: int
    split: int = 1


def length(ranges: Ranges) -> int:
    """Indices covered."""
    return sum(stop - start for start, stop in ranges)


def _take(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Elements [start, stop) of the sequence that the ranges spell out."""
    out, passed = [], 0
    for low, high in ranges:
        a, b = max(low, low + start - passed), min(high, low + stop - passed)
        if a < b:
            out.append((a, b))
        passed += high - low
    return tuple(out)


def _joined(parts: list[Ranges]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in itertools.chain(*parts):
        if out and out[-1][1] == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return tuple(out)


def chunks(ranges: Ranges, ways: int) -> list[Ranges]:
    """As ``torch.chunk`` cuts: equal geometries rounded up, the last ones shorter or empty."""
    size = -(-length(ranges) // ways)
    return [_take(ranges, i * size, (i + 1) * size) for i in range(ways)]


def _strided(ranges: Ranges, deal: Deal) -> list[Ranges]:
    """As a strided shard cuts: ``split`` chunks first, each dealt out, then everybody's shares joined."""
    shares = [chunks(chunk, deal.ways) for chunk in chunks(ranges, deal.split)]
    return [_joined([share[i] for share in shares]) for i in range(deal.ways)]


@lru_cache(maxsize=4096)
def holdings(size: int, deals: tuple[Deal, ...], inner_first: bool = True) -> dict[tuple[int, ...], Ranges]:
    """What every coordinate holds of an axis.

    Args:
        size: the axis's global size.
        deals: the mesh dimensions that cut it, in the mesh's order.
        inner_first: FSDP2 over tensor parallelism writes strided shards, but cuts the inner mesh dimensions' shards.
            The two differ where sizes do not divide. True: as FSDP2 cuts. False: as the placement says by itself.

    Returns:
        coordinate along ``deals`` -> its ranges.
    """
    order = list(range(len(deals)))
    if inner_first:
        late = {k for k in order if deals[k].split > 1 and deals[k].split == prod(d.ways for d in deals[k + 1 :])}
        order = [k for k in order if k not in late] + sorted(late, reverse=True)
    else:
        late = set()
    held: dict[tuple[tuple[int, int], ...], Ranges] = {(): ((0, size),) if size else ()}
    for k in order:
        deal = Deal(deals[k].ways) if k in late else deals[k]
        held = {
            (*coordinate, (k, i)): share
            for coordinate, ranges in held.items()
            for i, share in enumerate(_strided(ranges, deal) if deal.split > 1 else chunks(ranges, deal.ways))
        }
    return {tuple(i for _, i in sorted(coordinate)): ranges for coordinate, ranges in held.items()}


class Edges:
    """Where the runs of an axis begin and end, by arithmetic: elementwise, there are as many runs as elements."""

    def __init__(self, runs: Runs) -> None:
        self.many, self._total, self._period = len(runs), runs.total, runs.total // runs.repeat
        self._sizes = [size for size, _ in runs.segments]
        self._starts, self._firsts = [0], [0]  # of segments within a period: indices, and runs
        for size, count in runs.segments:
            self._starts.append(self._starts[-1] + size * count)
            self._firsts.append(self._firsts[-1] + count)

    def _at(self, index: int) -> tuple[int, int]:
        """The run that holds an index, and how far into it the index is."""
        if index >= self._total:
            return self.many, 0
        turn, rest = divmod(index, self._period)
        k = bisect_right(self._starts, rest) - 1
        run, inside = divmod(rest - self._starts[k], self._sizes[k])
        return turn * self._firsts[-1] + self._firsts[k] + run, inside

    def run_of(self, index: int) -> int:
        """The run that holds an index; the number of runs behind the last one."""
        return self._at(index)[0]

    def inside(self, index: int) -> bool:
        """Whether a cut in front of this index goes through a run."""
        return index > 0 and self._at(index)[1] > 0

    def lengths(self, run: torch.Tensor) -> torch.Tensor:
        """Lengths of the runs of these numbers, int64."""
        if not self.many:
            return torch.zeros_like(run)
        segment = torch.searchsorted(torch.tensor(self._firsts[1:]), run % self._firsts[-1], right=True)
        return torch.tensor(self._sizes)[segment]


def run_ids(edges: Edges, ranges: Ranges) -> torch.Tensor:
    """The runs that the ranges touch, ascending, int64."""
    spans = [torch.arange(edges.run_of(a), edges.run_of(b - 1) + 1) for a, b in ranges]
    if len(spans) == 1:
        return spans[0]
    return torch.cat(spans).unique() if spans else torch.zeros(0, dtype=torch.int64)


def cut_runs(edges: Edges, held: dict[tuple[int, ...], Ranges]) -> dict[int, set[tuple[int, ...]]]:
    """The runs that several coordinates hold parts of, with those coordinates."""
    through = {edges.run_of(x) for ranges in held.values() for span in ranges for x in span if edges.inside(x)}
    holders: dict[int, set[tuple[int, ...]]] = {run: set() for run in sorted(through)}
    for coordinate, ranges in held.items():
        for start, stop in ranges:
            for run in {edges.run_of(start), edges.run_of(stop - 1)} & through:
                holders[run].add(coordinate)
    return {run: coordinates for run, coordinates in holders.items() if len(coordinates) > 1}


def local_runs(runs: Runs, edges: Edges, ranges: Ranges) -> Runs:
    """The runs of what the ranges cover; parts of one run that become neighbours are one run."""
    if len(ranges) == 1:
        return _slice(runs, *ranges[0])
    held: Counter[int] = Counter()
    for span in ranges:
        first, slices = edges.run_of(span[0]), _slice(runs, *span).lengths().tolist()
        for k, size in enumerate(slices):
            held[first + k] += size
    return Runs.of(held[run] for run in sorted(held))


def _slice(runs: Runs, start: int, stop: int) -> Runs:
    """Runs of the indices [start, stop), without spelling out what is compressed."""
    period = runs.total // runs.repeat
    if period and start % period == 0 and stop % period == 0 and stop > start:
        return Runs(runs.segments, (stop - start) // period)
    out: list[tuple[int, int]] = []
    for turn in range(start // period if period else 0, runs.repeat):
        at = turn * period
        if at >= stop:
            break
        for size, count in runs.segments:
            out += _slice_segment(size, count, max(start - at, 0), min(stop - at, size * count))
            at += size * count
    return Runs(tuple(out))


def _slice_segment(size: int, count: int, start: int, stop: int) -> list[tuple[int, int]]:
    """(length, count) pairs of indices [start, stop) of ``count`` runs of one length."""
    if stop <= start:
        return []
    first, last = start // size, (stop - 1) // size
    if first == last:
        return [(stop - start, 1)]
    head, tail = (first + 1) * size - start, stop - last * size
    return [(head, 1), (size, last - first - 1), (tail, 1)]
