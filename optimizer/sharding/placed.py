"""The local geometry of a DTensor, from its mesh, its placements and its layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from ..partition.layout import Layout, Runs
from .exchange import destroyed
from .flat import box_shapes, split
from .geometry import Blocks, Box, Cut, Geometry, Placed
from .holdings import Edges, MeshSharding, Ranges, cut_runs, holdings, length, local_runs, run_ids


def placed_geometry(param: DTensor, layout: Layout, where: str = "parameter") -> Geometry:
    """Return the local geometry of a DTensor parameter.

    Args:
        param: the parameter, on any mesh, with Replicate, Shard and strided Shard placements, even or uneven.
        layout: layout of the global tensor.
        where: description of the parameter for error messages.

    Raises:
        ValueError: the parameter has another placement (Partial, for instance), or the size of its local tensor does
            not follow from its placements.
        RuntimeError: a process group of the mesh was destroyed.
    """
    mesh, shape = param.device_mesh, tuple(param.shape)
    layout.require(shape, where)
    layout, folded = _unfolded(layout, shape)
    placements, local = tuple(param.placements), tuple(param.to_local().shape)
    coordinate, axes = mesh.get_coordinate(), held_axes(param, where)
    if coordinate is None:  # a rank outside the mesh stores no elements
        return Geometry(local, (), (0,))
    slab = _Slab(layout, shape, axes, coordinate)
    aligned = layout.aligned_shape(shape)
    # Axes along which the second moment has one value per index, or per folded matrix.
    full_axes = {d for d in range(len(shape)) if aligned[d] == shape[d] or (d == 0 and folded and not slab.splits)}
    second = tuple(
        p if isinstance(p, Replicate) or p.dim in full_axes else Replicate()  # type: ignore[attr-defined]
        for p in placements
    )
    local_aligned = tuple(
        local[d] * aligned[d] // shape[d] if d in full_axes and shape[d] else aligned[d] for d in range(len(shape))
    )
    groups = mesh_groups(mesh, (m for axis in axes.values() for m in axis.dims), where)
    blocks = (layout.axis, layout.leading, layout.fold, layout.runs)
    orders = sorted((d, axis.inner_first) for d, axis in axes.items())
    signature = repr((shape, *blocks, placements, mesh.mesh.tolist(), orders))
    cut = slab.cut([groups[m] for m in sorted(slab.dims)], torch.device(mesh.device_type))
    boxes = slab.boxes()
    one_value_per_row = (
        layout.axis == 0
        and not layout.leading
        and local_aligned == (*local[:1], *(1 for _ in local[1:]))
        and prod(local) > 0
    )
    if cut is not None and len(boxes) == 1 and boxes[0].start is None and one_value_per_row:
        boxes, cut = _with_free_boxes(boxes[0], cut, local)
    held = {d: axis.ranges for d, axis in axes.items()}
    held_second = {
        d: tuple((a * aligned[d] // shape[d], b * aligned[d] // shape[d]) for a, b in ranges)
        for d, ranges in held.items()
        if d in full_axes
    }
    placed = Placed(mesh, second, aligned, held, held_second)
    return Geometry(local, boxes, local_aligned, cut, placed, signature, tuple(groups.values()))


def held_axes(param: DTensor, where: str) -> dict[int, HeldAxis]:
    """Return the sharded axes of a DTensor; none on a rank outside its mesh.

    Raises:
        ValueError: a placement is neither Replicate nor a Shard, or the local size does not follow from them.
    """
    mesh, placements, local = param.device_mesh, tuple(param.placements), tuple(param.to_local().shape)
    coordinate = mesh.get_coordinate()
    _require_supported(placements, where)
    if coordinate is None:
        return {}
    dims: dict[int, list[int]] = {}
    for m, placement in enumerate(placements):
        if mesh.size(m) > 1 and not isinstance(placement, Replicate):
            dims.setdefault(placement.dim, []).append(m)  # type: ignore[attr-defined]
    shardings = {d: [MeshSharding(mesh.size(m), _split(placements[m])) for m in ms] for d, ms in dims.items()}
    return {d: HeldAxis(param.shape[d], ms, shardings[d], coordinate, local[d], where) for d, ms in dims.items()}


def mesh_groups(mesh: DeviceMesh, dims: Iterable[int], where: str) -> dict[int, dist.ProcessGroup]:
    """Return the process group of each mesh dimension, ascending; raise RuntimeError if one was destroyed."""
    try:
        return {m: mesh.get_group(m) for m in sorted(set(dims))}
    except (RuntimeError, KeyError) as error:
        raise destroyed(f"the process group that {where} is sharded over") from error


def _with_free_boxes(box: Box, cut: Cut, local: tuple[int, ...]) -> tuple[tuple[Box, ...], Cut]:
    """Split a box so that the rows between those of shared blocks form a free box; return the boxes and the new cut."""
    spread = torch.arange(local[0]) if cut.blocks.spread is None else cut.blocks.spread
    shared = torch.zeros(len(cut.blocks.counts), dtype=torch.bool)
    shared[cut.slots] = True
    sliced = replace(box, start=0, stop=local[0], second=(0, local[0]), slots=spread)
    boxes = split(sliced, shared[spread])
    if not any(b.free for b in boxes):
        return (box,), cut
    values = [torch.arange(*b.second) for b in boxes if b.second is not None and not b.free]
    return tuple(boxes), replace(cut, values=torch.cat(values) if values else torch.zeros(0, dtype=torch.int64))


def _require_supported(placements: Sequence[Placement], where: str) -> None:
    """Raise ValueError for a placement that is neither Replicate nor a Shard."""
    for placement in placements:
        if isinstance(placement, Replicate) or type(placement).__name__ in ("Shard", "_StridedShard"):
            continue
        raise ValueError(
            f"{where} has placement {type(placement).__name__} ({placement}); a parameter can be stepped if it is "
            "Replicate or Shard: redistribute it before building the optimizer"
        )


def _split(placement: Placement) -> int:
    """Return the split factor of a strided shard; 1 for an ordinary shard."""
    return int(getattr(placement, "split_factor", 1))


def _unfolded(layout: Layout, shape: tuple[int, ...]) -> tuple[Layout, bool]:
    """Express a layout without a fold if the second moment has the whole axis 0 in either form.

    Args:
        layout: layout of the global tensor.
        shape: shape of the global tensor.

    Returns:
        A layout with the same blocks, and whether it still has a fold.
    """
    if layout.fold == 1:
        return layout, False
    rest = shape[0] // layout.fold
    if len(layout.leading) > 1:
        return Layout(layout.axis - 1, layout.runs, (layout.fold * rest, *layout.leading[2:])), False
    if layout.axis == 1:
        return Layout(0, Runs(layout.runs.segments, layout.runs.repeat * layout.fold)), False
    return layout, True


class HeldAxis:
    """One sharded axis of the tensor.

    Attributes:
        size: global size of the axis.
        dims: the mesh dimensions that shard it.
        coordinate: this rank's coordinate along ``dims``.
        inner_first: in which order the mesh dimensions cut the axis, as in ``holdings``.
        held: the index ranges of every coordinate along ``dims``.
    """

    def __init__(
        self,
        size: int,
        dims: list[int],
        shardings: list[MeshSharding],
        mesh_coordinate: Sequence[int],
        local: int,
        where: str,
    ) -> None:
        self.size, self.dims = size, tuple(dims)
        self.coordinate = tuple(mesh_coordinate[m] for m in dims)
        for self.inner_first in (True, False):
            self.held = holdings(size, tuple(shardings), self.inner_first)
            if length(self.held[self.coordinate]) == local:
                return
        raise ValueError(
            f"{where} holds {local} of {size} indices of an axis, but its placements give this rank "
            f"{length(self.held[self.coordinate])}; distribute it as distribute_tensor or fully_shard do"
        )

    @property
    def ranges(self) -> Ranges:
        """The index ranges of this rank."""
        return self.held[self.coordinate]


class _Slab:
    """This rank's shard as a product of index sets, and the mesh dimensions that cut its blocks.

    Attributes:
        axis: the tensor's axis along which the runs lie.
        splits: whether ranks cut through the matrices that a folded axis 0 consists of.
        leading: the leading axes, which no block extends over.
        edges: the edges of the runs; None if the tensor is not sharded.
        along: the sharding of ``axis``; None if that axis is not sharded.
        reduced: the sharded axes over which every block extends.
        cut_along: runs that are divided among coordinates of ``along``, with those coordinates.
        dims: the mesh dimensions over which blocks must be summed.
    """

    def __init__(
        self, layout: Layout, shape: tuple[int, ...], axes: dict[int, HeldAxis], coordinate: Sequence[int]
    ) -> None:
        self.global_layout, self.shape, self.axes, self.coordinate = layout, shape, axes, coordinate
        shift = 1 if layout.fold > 1 else 0  # the folded view has one axis more than the tensor
        self.axis = layout.axis - shift
        self.splits = bool(shift and 0 in axes and not self._whole_folds())
        self.leading = range(0 if self.splits else max(1, len(layout.leading)) if shift else len(layout.leading))
        self.edges = Edges(layout.runs) if axes and shape else None
        self.along = axes.get(self.axis)
        self.reduced = [axis for d, axis in axes.items() if d != self.axis and d not in self.leading and axis.size > 1]
        self.cut_along = cut_runs(self.edges, self.along.held) if self.edges and self.along else {}
        self.dims = {m for axis in self.reduced for m in axis.dims} | self._varying()

    def _whole_folds(self) -> bool:
        """Return whether every rank stores only whole matrices of the folded axis 0."""
        rest = self.shape[0] // self.global_layout.fold
        return all(x % rest == 0 for ranges in self.axes[0].held.values() for span in ranges for x in span)

    def _varying(self) -> set[int]:
        """Return the mesh dimensions along which the coordinates of a divided run differ."""
        if self.along is None:
            return set()
        return {
            m
            for k, m in enumerate(self.along.dims)
            if any(len({coordinate[k] for coordinate in holders}) > 1 for holders in self.cut_along.values())
        }

    def _local_runs(self) -> Runs:
        """Return the runs of this rank's indices along ``axis``."""
        assert self.edges is not None
        runs = self.global_layout.runs
        return local_runs(runs, self.edges, self.along.ranges) if self.along else runs

    def boxes(self) -> tuple[Box, ...]:
        """Return the boxes of the local tensor.

        There is one, the whole local tensor, unless ranks cut through folded matrices: each range of axis 0 then has a
        box of whole matrices and a box for the cut matrix at either end.
        """
        if not self.splits:
            return (Box(self._layout()),)
        assert self.edges is not None
        layout, offset, boxes = self.global_layout, 0, []
        lengths = self._local_runs().lengths()
        along = torch.arange(len(lengths)).repeat_interleave(lengths)
        for start, stop in self.axes[0].ranges:
            for (first, _), shape in box_shapes(start, stop, (layout.fold, self.shape[0] // layout.fold)):
                lead = torch.arange(first, first + shape[0]).unsqueeze(1)
                box_layout = Layout(layout.axis, self._local_runs(), shape[:1])
                slots = (lead * len(lengths) + along).flatten()
                second = (first, first + shape[0])
                boxes.append(Box(box_layout, offset, offset + prod(shape), shape, second, slots))
                offset += prod(shape)
        return tuple(boxes)

    def _layout(self) -> Layout:
        """Return the layout of the whole local tensor."""
        layout = self.global_layout
        if not self.axes:
            return layout
        sizes = [length(self.axes[d].ranges) if d in self.axes else self.shape[d] for d in range(len(self.shape))]
        if layout.fold == 1:
            return Layout(layout.axis, self._local_runs(), sizes[: len(layout.leading)], layout.note)
        fold = sizes[0] * layout.fold // self.shape[0]
        if fold > 1:
            return Layout(layout.axis, self._local_runs(), (fold,), layout.note, fold)
        return Layout(layout.axis - 1, self._local_runs(), (), layout.note)  # at most one matrix is left, so no fold

    def _leads(self) -> int:
        """Return the number of leading indices for which this rank stores second moments."""
        layout = self.global_layout
        if layout.fold > 1:
            held = length(self.axes[0].ranges) if 0 in self.axes and not self.splits else self.shape[0]
            return held * layout.fold // self.shape[0]
        return prod(self._layout().leading)

    def _shared(self) -> Tensor:
        """Return the runs shared with the ranks whose coordinates differ from this rank's along ``dims`` alone.

        The runs are global numbers, ascending, int64.
        """
        assert self.edges is not None
        if self.along is None:
            return torch.arange(self.edges.many)
        fixed = [k for k, m in enumerate(self.along.dims) if m not in self.dims]
        near = [c for c in self.along.held if all(c[k] == self.along.coordinate[k] for k in fixed)]
        if self.reduced:
            return torch.cat([run_ids(self.edges, self.along.held[c]) for c in near]).unique()
        return torch.tensor([r for r, holders in self.cut_along.items() if holders & set(near)], dtype=torch.int64)

    def cut(self, groups: Sequence[dist.ProcessGroup], device: torch.device) -> Cut | None:
        """Return the shared blocks, or None if this rank and its neighbours share none.

        Args:
            groups: the process groups of the mesh dimensions ``dims``, in order.
            device: device on which the groups communicate.
        """
        if not self.dims or self.edges is None:
            return None
        shared, leads = self._shared(), self._leads()
        if not len(shared) or not leads:
            return None
        local = run_ids(self.edges, self.along.ranges) if self.along else torch.arange(self.edges.many)
        held = torch.isin(shared, local)
        slots, positions = torch.searchsorted(local, shared[held]), held.nonzero().squeeze(1)
        lead = torch.arange(leads).unsqueeze(1)
        per_index = prod(self.shape) // max(1, prod(self.global_layout.aligned_shape(self.shape)))
        counts = (self.edges.lengths(local) * per_index).double().repeat(leads)
        lengths = self._local_runs().lengths().repeat(leads)
        spread = None if bool((lengths == 1).all()) else torch.arange(len(lengths)).repeat_interleave(lengths)
        return Cut(
            groups=tuple(groups),
            size=leads * len(shared),
            slots=(lead * len(local) + slots).flatten(),
            positions=(lead * len(shared) + positions).flatten(),
            blocks=Blocks(counts, spread),
            device=device,
        )
