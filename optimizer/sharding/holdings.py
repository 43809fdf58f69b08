"""Which indices of one axis each rank stores, from how the axis is sharded over a device mesh."""

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
"""Index ranges [start, stop), ascending, disjoint and non-empty."""


@dataclass(frozen=True)
class MeshSharding:
    """How one mesh dimension shards an axis.

    Attributes:
        ranks: number of ranks along the mesh dimension.
        split_factor: split factor of a strided shard; 1 for an ordinary shard.
    """

    ranks: int
    split_factor: int = 1


def length(ranges: Ranges) -> int:
    """Return the number of indices that the ranges cover."""
    return sum(stop - start for start, stop in ranges)


def _take(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Return elements [start, stop) of the concatenated ranges, as ranges."""
    out, offset = [], 0
    for low, high in ranges:
        first, last = max(low, low + start - offset), min(high, low + stop - offset)
        if first < last:
            out.append((first, last))
        offset += high - low
    return tuple(out)


def _joined(parts: list[Ranges]) -> Ranges:
    """Concatenate ranges, merging those that touch."""
    out: list[tuple[int, int]] = []
    for low, high in itertools.chain(*parts):
        if out and out[-1][1] == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return tuple(out)


def chunks(ranges: Ranges, count: int) -> list[Ranges]:
    """Cut ranges into ``count`` chunks as ``torch.chunk`` does: equal sizes rounded up, the last shorter or empty."""
    size = -(-length(ranges) // count)
    return [_take(ranges, i * size, (i + 1) * size) for i in range(count)]


def _strided(ranges: Ranges, sharding: MeshSharding) -> list[Ranges]:
    """Cut ranges as a strided shard does.

    The ranges are cut into ``split_factor`` chunks, each chunk is sharded over the ranks, and each rank's shards are
    concatenated.
    """
    shards = [chunks(chunk, sharding.ranks) for chunk in chunks(ranges, sharding.split_factor)]
    return [_joined([shard[i] for shard in shards]) for i in range(sharding.ranks)]


@lru_cache(maxsize=4096)
def holdings(size: int, shardings: tuple[MeshSharding, ...], inner_first: bool = True) -> dict[tuple[int, ...], Ranges]:
    """Return the indices of an axis that each mesh coordinate stores.

    Args:
        size: global size of the axis.
        shardings: the mesh dimensions that shard the axis, in the mesh's order.
        inner_first: ``fully_shard`` over tensor parallelism declares strided shards, but shards what the inner mesh
            dimensions leave. The two differ if sizes do not divide. True follows ``fully_shard``, False follows the
            declared placements.

    Returns:
        For each coordinate along ``shardings``, its index ranges.
    """
    order = list(range(len(shardings)))
    if inner_first:
        late = {
            k
            for k in order
            if shardings[k].split_factor > 1 and shardings[k].split_factor == prod(s.ranks for s in shardings[k + 1 :])
        }
        order = [k for k in order if k not in late] + sorted(late, reverse=True)
    else:
        late = set()
    held: dict[tuple[tuple[int, int], ...], Ranges] = {(): ((0, size),) if size else ()}
    for k in order:
        dim = MeshSharding(shardings[k].ranks) if k in late else shardings[k]
        held = {
            (*coordinate, (k, i)): shard
            for coordinate, ranges in held.items()
            for i, shard in enumerate(_strided(ranges, dim) if dim.split_factor > 1 else chunks(ranges, dim.ranks))
        }
    return {tuple(i for _, i in sorted(coordinate)): ranges for coordinate, ranges in held.items()}


class Edges:
    """The edges of an axis's runs, computed from the compressed runs.

    Nothing here is as long as the list of runs, because an elementwise layout has as many runs as elements.

    Attributes:
        many: number of runs.
    """

    def __init__(self, runs: Runs) -> None:
        self.many, self._total, self._period = len(runs), runs.total, runs.total // runs.repeat
        self._sizes = [size for size, _ in runs.segments]
        # For each segment of a period: its first index, and its first run.
        self._starts, self._firsts = [0], [0]
        for size, count in runs.segments:
            self._starts.append(self._starts[-1] + size * count)
            self._firsts.append(self._firsts[-1] + count)

    def _at(self, index: int) -> tuple[int, int]:
        """Return the run that contains an index, and the index's offset in that run."""
        if index >= self._total:
            return self.many, 0
        period, rest = divmod(index, self._period)
        k = bisect_right(self._starts, rest) - 1
        run, inside = divmod(rest - self._starts[k], self._sizes[k])
        return period * self._firsts[-1] + self._firsts[k] + run, inside

    def run_of(self, index: int) -> int:
        """Return the run that contains an index; the number of runs if the index is past the end."""
        return self._at(index)[0]

    def inside(self, index: int) -> bool:
        """Return whether a cut before this index divides a run."""
        return index > 0 and self._at(index)[1] > 0

    def lengths(self, run: torch.Tensor) -> torch.Tensor:
        """Return the lengths of these runs, int64."""
        if not self.many:
            return torch.zeros_like(run)
        segment = torch.searchsorted(torch.tensor(self._firsts[1:]), run % self._firsts[-1], right=True)
        return torch.tensor(self._sizes)[segment]


def run_ids(edges: Edges, ranges: Ranges) -> torch.Tensor:
    """Return the runs with indices in the ranges, ascending, int64."""
    spans = [torch.arange(edges.run_of(a), edges.run_of(b - 1) + 1) for a, b in ranges]
    if len(spans) == 1:
        return spans[0]
    return torch.cat(spans).unique() if spans else torch.zeros(0, dtype=torch.int64)


def cut_runs(edges: Edges, held: dict[tuple[int, ...], Ranges]) -> dict[int, set[tuple[int, ...]]]:
    """Return the runs that are divided among several mesh coordinates, each with those coordinates."""
    through = {edges.run_of(x) for ranges in held.values() for span in ranges for x in span if edges.inside(x)}
    holders: dict[int, set[tuple[int, ...]]] = {run: set() for run in sorted(through)}
    for coordinate, ranges in held.items():
        for start, stop in ranges:
            for run in {edges.run_of(start), edges.run_of(stop - 1)} & through:
                holders[run].add(coordinate)
    return {run: coordinates for run, coordinates in holders.items() if len(coordinates) > 1}


def local_runs(runs: Runs, edges: Edges, ranges: Ranges) -> Runs:
    """Return the runs of the indices in the ranges. Parts of one run that become neighbours form one run."""
    if len(ranges) == 1:
        return _slice(runs, *ranges[0])
    held: Counter[int] = Counter()
    for span in ranges:
        first, slices = edges.run_of(span[0]), _slice(runs, *span).lengths().tolist()
        for k, size in enumerate(slices):
            held[first + k] += size
    return Runs.of(held[run] for run in sorted(held))


def _slice(runs: Runs, start: int, stop: int) -> Runs:
    """Return the runs of the indices [start, stop), still compressed."""
    period = runs.total // runs.repeat
    if period and start % period == 0 and stop % period == 0 and stop > start:
        return Runs(runs.segments, (stop - start) // period)
    out: list[tuple[int, int]] = []
    for k in range(start // period if period else 0, runs.repeat):
        offset = k * period
        if offset >= stop:
            break
        for size, count in runs.segments:
            out += _slice_segment(size, count, max(start - offset, 0), min(stop - offset, size * count))
            offset += size * count
    return Runs(tuple(out))


def _slice_segment(size: int, count: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Return (length, count) pairs for the indices [start, stop) of ``count`` runs of length ``size``."""
    if stop <= start:
        return []
    first, last = start // size, (stop - 1) // size
    if first == last:
        return [(stop - start, 1)]
    head, tail = (first + 1) * size - start, stop - last * size
    return [(head, 1), (size, last - first - 1), (tail, 1)]
