"""From a DTensor's mesh and placements to the local geometry of its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from ..partition.layout import Layout, Runs
from .exchange import destroyed
from .flat import box_shapes, split
from .geometry import Blocks, Box, Cut, Geometry, Placed
from .holdings import Deal, Edges, Ranges, cut_runs, holdings, length, local_runs, run_ids


def placed_geometry(param: DTensor, layout: Layout, where: str = "parameter") -> Geometry:
    """The local geometry of a DTensor parameter.

    Args:
        param: any mesh; Replicate, Shard and strided shards, even or not.
        layout: of the global tensor.
        where: the parameter in words, for messages.

    Raises:
        ValueError: another placement (Partial, for instance), or a local tensor that its placements do not explain.
    """
    mesh, shape = param.device_mesh, tuple(param.shape)
    layout.require(shape, where)
    coordinate = mesh.get_coordinate()
    placements = tuple(param.placements)
    _require_known(placements, where)
    layout, folded = _unfolded(layout, shape)
    dims: dict[int, list[int]] = {}
    for m, placement in enumerate(placements):
        if mesh.size(m) > 1 and not isinstance(placement, Replicate):
            dims.setdefault(placement.dim, []).append(m)  # type: ignore[attr-defined]
    local = tuple(param.to_local().shape)
    if coordinate is None:  # a rank outside the mesh holds nothing
        return Geometry(local, (), (0,))
    axes = {
        d: _Axis(shape[d], ms, [Deal(mesh.size(m), _split(placements[m])) for m in ms], coordinate, local[d], where)
        for d, ms in dims.items()
    }
    slab = _Slab(layout, shape, axes, coordinate)
    aligned = layout.aligned_shape(shape)
    kept = {d for d in range(len(shape)) if aligned[d] == shape[d] or (d == 0 and folded and not slab.splits)}
    second = tuple(
        p if isinstance(p, Replicate) or p.dim in kept else Replicate()  # type: ignore[attr-defined]
        for p in placements
    )
    own = tuple(local[d] * aligned[d] // shape[d] if d in kept and shape[d] else aligned[d] for d in range(len(shape)))
    try:
        over = {m: mesh.get_group(m) for m in sorted({m for ms in dims.values() for m in ms})}
    except (RuntimeError, KeyError) as error:
        raise destroyed(f"the process group that {where} is sharded over") from error
    signature = repr((shape, layout.axis, layout.leading, layout.fold, layout.runs, placements, mesh.mesh.tolist(),
                      sorted((d, axis.inner_first) for d, axis in axes.items())))  # fmt: skip
    cut = slab.cut([over[m] for m in sorted(slab.dims)], torch.device(mesh.device_type))
    parts = slab.boxes()
    rows = layout.axis == 0 and not layout.leading and own == (local[0], *(1 for _ in local[1:])) and prod(local) > 0
    if cut is not None and len(parts) == 1 and parts[0].start is None and rows:
        parts, cut = _freed(parts[0], cut, local)
    held = {d: axis.ranges for d, axis in axes.items()}
    held_second = {
        d: tuple((a * aligned[d] // shape[d], b * aligned[d] // shape[d]) for a, b in ranges)
        for d, ranges in held.items()
        if d in kept
    }
    placed = Placed(mesh, second, aligned, held, held_second)
    return Geometry(local, parts, own, cut, placed, signature, tuple(over.values()))


def _freed(part: Box, cut: Cut, local: tuple[int, ...]) -> tuple[tuple[Box, ...], Cut]:
    """Rows between those of shared blocks in a part of their own, which an ordinary engine can take."""
    spread = torch.arange(local[0]) if cut.blocks.spread is None else cut.blocks.spread
    shared = torch.zeros(len(cut.blocks.counts), dtype=torch.bool)
    shared[cut.slots] = True
    held = replace(part, start=0, stop=local[0], second=(0, local[0]), slots=spread)
    parts = split(held, shared[spread])
    if not any(one.free for one in parts):
        return (part,), cut
    values = [torch.arange(*one.second) for one in parts if one.second is not None and not one.free]
    return tuple(parts), replace(cut, values=torch.cat(values) if values else torch.zeros(0, dtype=torch.int64))


def _require_known(placements: Sequence[Placement], where: str) -> None:
    for placement in placements:
        if isinstance(placement, Replicate) or type(placement).__name__ in ("Shard", "_StridedShard"):
            continue
        raise ValueError(
            f"{where} has placement {type(placement).__name__} ({placement}); a parameter can be stepped where it is "
            "Replicate or Shard: redistribute it before building the optimizer"
        )


def _split(placement: Placement) -> int:
    return int(getattr(placement, "split_factor", 1))


def _unfolded(layout: Layout, shape: tuple[int, ...]) -> tuple[Layout, bool]:
    """The same blocks without a fold, where the second moment keeps all of axis 0 anyway: (layout, still folded)."""
    if layout.fold == 1:
        return layout, False
    rest = shape[0] // layout.fold
    if len(layout.leading) > 1:
        return Layout(layout.axis - 1, layout.runs, (layout.fold * rest, *layout.leading[2:])), False
    if layout.axis == 1:
        return Layout(0, Runs(layout.runs.segments, layout.runs.repeat * layout.fold)), False
    return layout, True


class _Axis:
    """One axis of the tensor that mesh dimensions ``dims`` cut."""

    def __init__(
        self, size: int, dims: list[int], deals: list[Deal], coordinate: Sequence[int], local: int, where: str
    ) -> None:
        self.size, self.dims = size, tuple(dims)
        self.mine = tuple(coordinate[m] for m in dims)
        for self.inner_first in (True, False):
            self.held = holdings(size, tuple(deals), self.inner_first)
            if length(self.held[self.mine]) == local:
                return
        raise ValueError(
            f"{where} holds {local} of {size} indices of an axis, but its placements give this rank "
            f"{length(self.held[self.mine])}; distribute it as distribute_tensor or fully_shard do"
        )

    @property
    def ranges(self) -> Ranges:
        """What this rank holds."""
        return self.held[self.mine]


class _Slab:
    """What a rank holds, as a product of index sets, and which mesh dimensions cut its blocks."""

    def __init__(
        self, layout: Layout, shape: tuple[int, ...], axes: dict[int, _Axis], coordinate: Sequence[int]
    ) -> None:
        self.global_layout, self.shape, self.axes, self.coordinate = layout, shape, axes, coordinate
        shift = 1 if layout.fold > 1 else 0  # axes of the tensor count one less than those of the folded view
        self.axis = layout.axis - shift
        # Whether ranks cut through the matrices that a folded axis 0 holds one behind the other.
        self.splits = bool(shift and 0 in axes and not self._whole_folds())
        self.leading = range(0 if self.splits else max(1, len(layout.leading)) if shift else len(layout.leading))
        self.edges = Edges(layout.runs) if axes and shape else None
        self.along = axes.get(self.axis)
        self.reduced = [axis for d, axis in axes.items() if d != self.axis and d not in self.leading and axis.size > 1]
        self.cut_along = cut_runs(self.edges, self.along.held) if self.edges and self.along else {}
        self.dims = {m for axis in self.reduced for m in axis.dims} | self._varying()

    def _whole_folds(self) -> bool:
        """Whether every rank holds whole geometries of the folded axis 0."""
        rest = self.shape[0] // self.global_layout.fold
        return all(x % rest == 0 for ranges in self.axes[0].held.values() for span in ranges for x in span)

    def _varying(self) -> set[int]:
        """Mesh dimensions along which the holders of a cut run differ."""
        if self.along is None:
            return set()
        return {
            m
            for k, m in enumerate(self.along.dims)
            if any(len({coordinate[k] for coordinate in holders}) > 1 for holders in self.cut_along.values())
        }

    def _own_runs(self) -> Runs:
        assert self.edges is not None
        runs = self.global_layout.runs
        return local_runs(runs, self.edges, self.along.ranges) if self.along else runs

    def boxes(self) -> tuple[Box, ...]:
        """The local tensor: whole, but for folded matrices that are cut, which leave a box at each end of a range."""
        if not self.splits:
            return (Box(self._layout()),)
        assert self.edges is not None
        layout, at, parts = self.global_layout, 0, []
        lengths = self._own_runs().lengths()
        along = torch.arange(len(lengths)).repeat_interleave(lengths)
        for start, stop in self.axes[0].ranges:
            for (first, _), shape in box_shapes(start, stop, (layout.fold, self.shape[0] // layout.fold)):
                lead = torch.arange(first, first + shape[0]).unsqueeze(1)
                box = Layout(layout.axis, self._own_runs(), shape[:1])
                slots = (lead * len(lengths) + along).flatten()
                parts.append(Box(box, at, at + prod(shape), shape, (first, first + shape[0]), slots))
                at += prod(shape)
        return tuple(parts)

    def _layout(self) -> Layout:
        """Of the whole local tensor."""
        layout = self.global_layout
        if not self.axes:
            return layout
        sizes = [length(self.axes[d].ranges) if d in self.axes else self.shape[d] for d in range(len(self.shape))]
        if layout.fold == 1:
            return Layout(layout.axis, self._own_runs(), sizes[: len(layout.leading)], layout.note)
        fold = sizes[0] * layout.fold // self.shape[0]
        if fold > 1:
            return Layout(layout.axis, self._own_runs(), (fold,), layout.note, fold)
        return Layout(layout.axis - 1, self._own_runs(), (), layout.note)  # one matrix, or none: nothing to split

    def _leads(self) -> int:
        """Leading indices with values of the second moment here."""
        layout = self.global_layout
        if layout.fold > 1:
            held = length(self.axes[0].ranges) if 0 in self.axes and not self.splits else self.shape[0]
            return held * layout.fold // self.shape[0]
        return prod(self._layout().leading)

    def _shared(self) -> Tensor:
        """Runs to be summed with the ranks that differ from this one along ``dims`` only, ascending."""
        assert self.edges is not None
        if self.along is None:
            return torch.arange(self.edges.many)
        fixed = [k for k, m in enumerate(self.along.dims) if m not in self.dims]
        near = [c for c in self.along.held if all(c[k] == self.along.mine[k] for k in fixed)]
        if self.reduced:
            return torch.cat([run_ids(self.edges, self.along.held[c]) for c in near]).unique()
        return torch.tensor([r for r, holders in self.cut_along.items() if holders & set(near)], dtype=torch.int64)

    def cut(self, groups: Sequence[dist.ProcessGroup], device: torch.device) -> Cut | None:
        """The shared blocks, or None where this rank and its neighbours share none."""
        if not self.dims or self.edges is None:
            return None
        shared, leads = self._shared(), self._leads()
        if not len(shared) or not leads:
            return None
        mine = run_ids(self.edges, self.along.ranges) if self.along else torch.arange(self.edges.many)
        held = torch.isin(shared, mine)
        slots, positions = torch.searchsorted(mine, shared[held]), held.nonzero().squeeze(1)
        lead = torch.arange(leads).unsqueeze(1)
        per_index = prod(self.shape) // max(1, prod(self.global_layout.aligned_shape(self.shape)))
        counts = (self.edges.lengths(mine) * per_index).double().repeat(leads)
        lengths = self._own_runs().lengths().repeat(leads)
        spread = None if bool((lengths == 1).all()) else torch.arange(len(lengths)).repeat_interleave(lengths)
        return Cut(
            groups=tuple(groups),
            size=leads * len(shared),
            slots=(lead * len(mine) + slots).flatten(),
            positions=(lead * len(shared) + positions).flatten(),
            blocks=Blocks(counts, spread),
            device=device,
        )
