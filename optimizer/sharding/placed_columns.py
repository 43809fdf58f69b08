"""The local geometry of a DTensor with a factored second moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..partition.factored import FactoredLayout
from .columns import Columns, Matrices, Piece, consecutive
from .geometry import Blocks, Box, Cut, Geometry, Placed
from .placed import HeldAxis, held_axes, mesh_groups, placed_geometry


def placed_factored_geometry(param: DTensor, layout: FactoredLayout, where: str = "parameter") -> Geometry:
    """Return the local geometry of a DTensor parameter with a factored second moment.

    Args:
        param: the parameter, with the placements that ``placed_geometry`` supports.
        layout: layout of the global tensor.
        where: description of the parameter for error messages.

    Raises:
        ValueError: as in ``placed_geometry``, or the shape does not fit the layout.
        RuntimeError: a process group of the mesh was destroyed.
    """
    layout.require(param.shape, where)
    layout = layout.merged()
    geometry = placed_geometry(param, layout.rows, where)
    signature = repr((geometry.signature, layout.segments, layout.repeat, layout.parts))
    axes, mesh = held_axes(param, where), param.device_mesh
    if mesh.get_coordinate() is None:
        nothing = torch.zeros(0, dtype=torch.int64)
        columns = Columns((0,), (), nothing, nothing, 0, nothing, 0, (), (), torch.device(mesh.device_type))
        return replace(geometry, columns=columns, signature=signature)
    shift = 1 if layout.fold > 1 else 0  # the folded view has one axis more than the tensor
    axis, splits = layout.axis - shift, _splits(layout, tuple(param.shape), axes)
    leading = range(0 if splits else max(len(layout.leading), shift))
    along = axes.get(axis)
    across = [m for d, held in axes.items() if d != axis and d not in leading and held.size > 1 for m in held.dims]
    groups = mesh_groups(mesh, (m for held in axes.values() for m in held.dims), where)
    shape = (*geometry.shape[:axis], layout.parts, *geometry.shape[axis + 1 :])
    parts = layout.part_of_row()
    if along is not None:
        parts = torch.cat([parts[start:stop] for start, stop in along.ranges] or [parts[:0]])
    matrices = tuple(_matrices(layout, geometry, parts, shape, axis))
    held = [torch.arange(*box.second) for box in geometry.boxes if box.second]
    folds = torch.cat(held or [parts[:0]]) if splits else None  # A rank may hold nothing of the tensor.
    counts = [prod(m.shape[: m.leading]) * layout.parts for m in matrices]
    positions = torch.arange(sum(counts))
    if folds is not None:
        positions = (folds.unsqueeze(1) * layout.parts + torch.arange(layout.parts)).flatten()
    values = torch.arange(prod(shape) if along is not None else 0)
    local = _local(layout, geometry, geometry.boxes[0], parts, axis) if len(geometry.boxes) == 1 else None
    columns = Columns(
        shape=shape,
        matrices=matrices,
        slots=values,
        positions=values,
        size=len(values),
        mean_positions=positions,
        mean_size=len(positions) if folds is None else layout.fold * layout.parts,
        groups=tuple(groups[m] for m in sorted(along.dims)) if along is not None else (),
        row_groups=tuple(groups[m] for m in sorted(across)),
        device=torch.device(mesh.device_type),
        placed=_placed(param, layout, axis, axes),
        local=local,
    )
    if columns.all_groups:
        boxes = tuple(replace(box, factored=True) for box in geometry.boxes)
        cut = geometry.cut or _uncut(geometry, layout)
        return replace(geometry, columns=columns, boxes=boxes, cut=cut, signature=signature)
    assert local is not None  # a local tensor has several boxes only if ranks cut through its matrices
    boxes = tuple(replace(box, layout=local) for box in geometry.boxes)
    return replace(geometry, columns=columns, boxes=boxes, signature=signature)


def _splits(layout: FactoredLayout, shape: tuple[int, ...], axes: Mapping[int, HeldAxis]) -> bool:
    """Return whether ranks cut through the matrices that a folded axis 0 consists of."""
    if layout.fold == 1 or 0 not in axes:
        return False
    rest = shape[0] // layout.fold
    return any(x % rest for ranges in axes[0].held.values() for span in ranges for x in span)


def _matrices(
    layout: FactoredLayout, geometry: Geometry, parts: Tensor, shape: tuple[int, ...], axis: int
) -> Iterator[Matrices]:
    """Yield the column means of each box.

    Args:
        layout: layout of the global tensor, folded only if the rows do not lie along axis 0.
        geometry: geometry of the rows.
        parts: the part of each local index of ``axis``.
        shape: shape of the local column means.
        axis: the tensor's axis of the rows.
    """
    for k, box in enumerate(geometry.boxes):
        if box.shape is not None:
            view: tuple[int, ...] = (*box.shape, *shape[1:])
        elif box.layout.fold > 1:
            view = (box.layout.fold, shape[0] // box.layout.fold, *shape[1:])
        else:
            view = shape
        at = axis + len(view) - len(shape)
        yield Matrices(
            offset=(box.start or 0) * prod(shape[1:]),
            shape=view,
            axis=at,
            leading=len(layout.leading) if layout.fold == 1 else len(view) - len(shape),
            sizes=layout.part_sizes().double().reshape([-1 if d == at else 1 for d in range(len(view))]),
            columns=layout.columns,
            pieces=tuple(Piece(k, at, start, n, ((at, part, 1),)) for part, start, n in consecutive(parts)),
        )


def _placed(param: DTensor, layout: FactoredLayout, axis: int, axes: Mapping[int, HeldAxis]) -> Placed:
    """Return the placement of the column means: that of the parameter, but replicated where ``axis`` is sharded."""
    held = {d: x.ranges for d, x in axes.items()}
    placements = tuple(
        Replicate() if getattr(placement, "dim", None) == axis else placement for placement in param.placements
    )
    second = {d: ranges for d, ranges in held.items() if d != axis}
    return Placed(param.device_mesh, placements, layout.columns_shape(param.shape), held, second)


def _uncut(geometry: Geometry, layout: FactoredLayout) -> Cut:
    """Return a cut that shares no row, for a tensor that shares columns only."""
    nothing = torch.zeros(0, dtype=torch.int64)
    counts = torch.full((prod(geometry.aligned),), float(layout.columns), dtype=torch.float64)
    assert geometry.placed is not None
    device = torch.device(geometry.placed.mesh.device_type)
    return Cut((), 0, nothing, nothing, Blocks(counts, None), device)


def _local(layout: FactoredLayout, geometry: Geometry, box: Box, parts: Tensor, axis: int) -> FactoredLayout:
    """Return the factored layout of a local tensor that is a single box."""
    segments = [(part, count) for part, _, count in consecutive(parts)]
    fold = box.layout.fold
    return FactoredLayout(
        geometry.shape,
        axis + (1 if fold > 1 else 0),
        segments,
        parts=layout.parts,
        leading=len(layout.leading) if layout.fold == 1 else int(fold > 1),
        fold=fold,
        note=layout.note,
    )
