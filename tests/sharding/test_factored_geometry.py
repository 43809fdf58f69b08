"""What every rank holds, sends and keeps of factored tensors, in one process, for random layouts and placements.

``test_geometry`` does the same for layouts of blocks. Real processes train models in ``test_training``, but none
of their tensors concatenates experts along axis 0 and is cut inside one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from optimizer.partition import FactoredLayout
from optimizer.sharding import exchange
from optimizer.sharding.columns import unsharded
from optimizer.sharding.cut_update import cut_update
from optimizer.sharding.elements import narrow, widen
from optimizer.sharding.flat import Range, flat_geometry
from optimizer.sharding.flat_columns import held_columns
from optimizer.sharding.flat_moments import range_of
from optimizer.sharding.geometry import Box, Geometry
from optimizer.sharding.placed_columns import placed_factored_geometry
from optimizer.step.factored import factored_update
from tests.optimizer.strategies import factored_layouts
from tests.sharding.in_one_process import NUMBERS, ranks, share

TENSORS = ("param", "grad", "exp_avg", "exp_avg_sq", "exp_avg_sq_col")


def _before_and_after(
    layout: FactoredLayout, shape: tuple[int, ...], silent: tuple[int, int] = (0, 0)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole tensors of a third step, before and after it. Two steps have made the means consistent.

    The gradient of the third step is zero at the elements [start, stop) of ``silent``.
    """
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(shape, dtype=torch.float64)
    whole = {"param": torch.randn(shape, dtype=torch.float64, generator=generator), "exp_avg": zeros}
    whole["exp_avg_sq"] = zeros.new_zeros(layout.aligned_shape(shape))
    whole["exp_avg_sq_col"] = zeros.new_zeros(layout.columns_shape(shape))
    for step in (1, 2, 3):
        whole["grad"] = torch.randn(shape, dtype=torch.float64, generator=generator)
        if step == 3:
            whole["grad"].view(-1)[silent[0] : silent[1]] = 0
        before = {name: x.clone() for name, x in whole.items()}
        factored_update(*(whole[name] for name in TENSORS), layout, step=step, **NUMBERS)
    return before, whole


Known = dict[Any, tuple[int, ...]]
"""The ranks of process groups, asked for while the groups exist."""


def _noted(geometry: Geometry, known: Known) -> None:
    """Note the ranks of the groups over which a rank sends."""
    known.update({group: exchange.ranks_of(group) for _, groups in geometry.sent for group in groups})


def _exchanged(
    geometries: list[Geometry],
    stages: list[list[tuple[int, ...]]],
    known: Known,
    grads: list[Tensor | None],
    columns: list[Tensor],
) -> list[Any]:
    """The means of each rank as after its messages; ``stages`` are the groups of each dimension of the mesh."""
    works = [
        exchange.Work(geometry, g, torch.float64, c) for geometry, g, c in zip(geometries, grads, columns, strict=True)
    ]
    shares = []
    for work in works:
        if work.geometry.cut is None:
            shares.append(None)
            continue
        rows = exchange._local_share(*work[:3])
        own = work.geometry.columns.shares(work.geometry.boxes, work.grad, rows)
        shares.append((rows, own, exchange._messages(work, rows, own)))
    for groups in stages:
        sums: list[tuple[int, int, Tensor]] = []
        for members in groups:
            senders = {rank: _sent_to(members, shares[rank], known) for rank in members}
            assert len({tuple(own) for own in senders.values()}) == 1, "a rank would wait in vain"
            for k in senders[members[0]]:
                vectors = [shares[rank][2][k].vector for rank in members]
                assert len({len(vector) for vector in vectors}) == 1
                sums += [(rank, k, torch.stack(vectors).sum(0)) for rank in members]
        for rank, k, vector in sums:
            shares[rank][2][k].vector.copy_(vector)
    return [
        None if own is None else exchange._received(geometry, *own[:2], [message.vector for message in own[2]])
        for geometry, own in zip(geometries, shares, strict=True)
    ]


def _sent_to(members: tuple[int, ...], own: Any, known: Known) -> list[int]:
    """Which of a rank's messages go to the group of these ranks."""
    messages = [] if own is None else own[2]
    return [k for k, message in enumerate(messages) if members in [known[group] for group in message.groups]]


def _step(geometry: Geometry, means: Any, own: dict[str, Tensor], *, silent: bool = False) -> None:
    """Step a shard: its free boxes as an engine does, and then the rest; or all of it without a gradient."""
    state = {name: own[name] for name in TENSORS[2:]}
    if means is not None:
        for box in geometry.free if not silent else ():
            assert isinstance(box.layout, FactoredLayout) and box.shape is not None
            views = [box.of(own[name]) for name in TENSORS[:3]]
            means_of_box = box.of_second(own["exp_avg_sq"], box.shape), box.of_columns(own["exp_avg_sq_col"])
            factored_update(*views, *means_of_box, box.layout, step=3, **NUMBERS)
        cut_update(geometry, own["param"], None if silent else own["grad"], state, means, step=3, **NUMBERS)
        return
    for box in geometry.boxes:
        factored_update(own["param"], own["grad"], *state.values(), box.layout, step=3, **NUMBERS)  # type: ignore[arg-type]


@st.composite
def placed(draw: st.DrawFn) -> tuple[Any, ...]:
    """A layout, its shape, a mesh and placements."""
    layout, shape = draw(factored_layouts())
    mesh = draw(st.sampled_from([(2,), (3,), (2, 2), (3, 2), (2, 3)]))
    dims = st.integers(0, len(shape) - 1)
    if len(mesh) == 2 and draw(st.booleans()):  # FSDP2 over tensor parallelism along one axis
        dim = draw(dims)
        return layout, shape, mesh, [_StridedShard(dim, split_factor=mesh[1]), Shard(dim)]
    return layout, shape, mesh, [draw(st.one_of(st.just(Replicate()), dims.map(Shard))) for _ in mesh]


TRANSPOSED_EXPERTS = FactoredLayout((12, 5), 2, [(0, 2), (1, 3)], leading=1, fold=3)
"""Three experts of 4 inputs, one after another along axis 0, and two parts of outputs along axis 1."""


def _folded(shape: tuple[int, ...], axis: int, mesh: tuple[int, ...], placements: list[Any], **more: int) -> Any:
    """A case whose axis 0 is folded."""
    layout = FactoredLayout(shape, axis, [(0, more.pop("rows", 1))], leading=1, **more)
    return layout, shape, mesh, placements


RANKS_WITHOUT_ELEMENTS = (
    _folded((9, 1), 2, (3, 2), [_StridedShard(0, split_factor=2), Shard(0)], fold=3),
    _folded((6, 1, 1), 3, (3, 2), [Shard(0), Shard(1)], fold=2),
    _folded((4, 1), 1, (2, 2), [Shard(0), Shard(1)], fold=2, rows=2),
    _folded((2, 3), 2, (2, 3), [Shard(1), Shard(0)], fold=2, repeat=3),
)
"""Tensors of which some ranks hold nothing, although they take part in the exchange of means."""


@given(placed())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@example((FactoredLayout((2, 5), 0), (2, 5), (3,), [Shard(0)]))  # a rank has no row, but all column means
@example((TRANSPOSED_EXPERTS, (12, 5), (3,), [Shard(0)]))  # whole experts
@example((TRANSPOSED_EXPERTS, (12, 5), (2,), [Shard(0)]))  # an expert is cut
@example((TRANSPOSED_EXPERTS, (12, 5), (2, 2), [Shard(0), Shard(1)]))
@example((TRANSPOSED_EXPERTS, (12, 5), (2, 3), [_StridedShard(0, split_factor=3), Shard(0)]))
@example((FactoredLayout((7, 5), 0, [(0, 3), (1, 4)]), (7, 5), (2, 2), [Shard(0), Shard(1)]))
@example(RANKS_WITHOUT_ELEMENTS[0])
@example(RANKS_WITHOUT_ELEMENTS[1])
@example(RANKS_WITHOUT_ELEMENTS[2])
@example(RANKS_WITHOUT_ELEMENTS[3])
def test_placed_shards_step_as_the_whole(case: tuple[Any, ...]) -> None:
    layout, shape, mesh_shape, placements = case
    before, after = _before_and_after(layout, shape)
    geometries, held, stages = [], [], [[] for _ in mesh_shape]
    known: Known = {}
    for _ in ranks(prod(mesh_shape)):
        mesh = init_device_mesh("cpu", mesh_shape)
        own = share(torch.arange(prod(shape)).view(shape), mesh, placements)
        strides = torch.empty(shape, device="meta").stride()
        parameter = DTensor.from_local(
            own.double(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )
        geometry = placed_factored_geometry(parameter, layout)
        assert geometry.columns is not None and geometry.columns.placed is not None and geometry.placed is not None
        index = dict.fromkeys(TENSORS[:3], own)
        for name, where in (("exp_avg_sq", geometry.placed), ("exp_avg_sq_col", geometry.columns.placed)):
            numbers = torch.arange(before[name].numel()).view(where.shape)
            index[name] = share(numbers, mesh, list(where.placements))
        assert tuple(index["exp_avg_sq"].shape) == geometry.aligned
        assert tuple(index["exp_avg_sq_col"].shape) == geometry.columns.shape
        geometries.append(geometry)
        held.append(index)
        _noted(geometry, known)
        for m, groups in enumerate(stages):
            members = exchange.ranks_of(mesh.get_group(m))
            if members not in groups:
                groups.append(members)
    locals_ = [{name: before[name].flatten()[index] for name, index in own.items()} for own in held]
    means = _exchanged(
        geometries, stages, known, [own["grad"] for own in locals_], [own["exp_avg_sq_col"] for own in locals_]
    )
    for geometry, mean, own, index in zip(geometries, means, locals_, held, strict=True):
        _step(geometry, mean, own)
        for name in TENSORS:
            torch.testing.assert_close(own[name], after[name].flatten()[index[name]], rtol=1e-11, atol=1e-12, msg=name)


SMALL = FactoredLayout((4, 6), 1, [(0, 2), (1, 4)])
"""A matrix whose rows lie along its last axis, in two parts."""


@given(st.lists(factored_layouts(), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 2), st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@example([(TRANSPOSED_EXPERTS, (12, 5))], 2, 0, False)
@example([(TRANSPOSED_EXPERTS, (12, 5)), (SMALL, (4, 6))], 4, 1, False)
@example([(SMALL, (4, 6)), (TRANSPOSED_EXPERTS, (12, 5)), (SMALL, (4, 6))], 2, 1, False)  # cut between two whole ones
@example([(SMALL, (4, 6)), (TRANSPOSED_EXPERTS, (12, 5)), (SMALL, (4, 6))], 2, 1, True)
def test_flat_shards_step_as_the_whole(several: list[Any], world: int, padding: int, silent: bool) -> None:
    """Whole tensors are free boxes, which an engine steps. If ``silent``, the last rank has no gradient."""
    starts, at = [], 0
    for _, shape in several:
        starts.append(at + padding)
        at += padding + prod(shape)
    size = -(-at // world)
    bounds = []
    for s, (_, shape) in zip(starts, several, strict=True):
        own = [(max(r * size, s) - s, min((r + 1) * size, s + prod(shape)) - s) for r in range(world)]
        bounds.append(tuple((a, b) if a < b else (0, 0) for a, b in own))
    wholes = [
        _before_and_after(layout, shape, own[-1] if silent else (0, 0))
        for (layout, shape), own in zip(several, bounds, strict=True)
    ]
    geometries, local = [], []
    known: Known = {}
    for rank in ranks(world):
        ranges = [
            Range(shape, layout, own, rank, max(s - rank * size, 0))
            for (layout, shape), own, s in zip(several, bounds, starts, strict=True)
        ]
        geometries.append(flat_geometry(ranges, size, dist.group.WORLD, torch.device("cpu")))
        held = [(r.shape, r.offset) for r in ranges if r.stop - r.start == prod(r.shape)]
        assert [(r.shape, box.start) for r, box in _free(geometries[-1], ranges)] == held, "whole tensors are free"
        local.append(ranges)
        _noted(geometries[-1], known)
        everyone = exchange.ranks_of(dist.group.WORLD)

    def spread(name: str, ranges: list[Range]) -> Tensor:
        out = torch.zeros(size, dtype=torch.float64)
        for r, (before, _) in zip(ranges, wholes, strict=True):
            out[r.offset : r.offset + r.stop - r.start] = before[name].flatten()[r.start : r.stop]
        return out

    own = [{name: spread(name, ranges) for name in TENSORS[:3]} for ranges in local]
    for geometry, ranges, tensors in zip(geometries, local, own, strict=True):
        tensors["exp_avg_sq"] = _rows(geometry, ranges, [before for before, _ in wholes])
        columns = [held_columns(r, before["exp_avg_sq_col"]) for r, (before, _) in zip(ranges, wholes, strict=True)]
        tensors["exp_avg_sq_col"] = torch.cat(columns)
    quiet = [silent and rank == world - 1 for rank in range(world)]
    grads = [None if without else x["grad"] for without, x in zip(quiet, own, strict=True)]
    means = _exchanged(geometries, [[everyone]], known, grads, [x["exp_avg_sq_col"] for x in own])
    for geometry, ranges, mean, tensors, without in zip(geometries, local, means, own, quiet, strict=True):
        _step(geometry, mean, tensors, silent=without)
        for r, (_, after) in zip(ranges, wholes, strict=True):
            for name in ("param", "exp_avg"):
                ours = tensors[name][r.offset : r.offset + r.stop - r.start]
                torch.testing.assert_close(ours, after[name].flatten()[r.start : r.stop], rtol=1e-11, atol=1e-12)
        columns = [held_columns(r, after["exp_avg_sq_col"]) for r, (_, after) in zip(ranges, wholes, strict=True)]
        torch.testing.assert_close(tensors["exp_avg_sq_col"], torch.cat(columns), rtol=1e-11, atol=1e-12)
        rows = _rows(geometry, ranges, [after for _, after in wholes])
        # By element, because no step uses the means of rows without an element on this rank.
        by_element = widen(geometry, tensors["exp_avg_sq"]), widen(geometry, rows)
        torch.testing.assert_close(*by_element, rtol=1e-11, atol=1e-12)


def _free(geometry: Geometry, ranges: list[Range]) -> list[tuple[Range, Box]]:
    """The free boxes of a flat tensor, each with the range of its elements."""
    return [(ranges[range_of(ranges, box)], box) for box in geometry.free]


def _rows(geometry: Geometry, ranges: list[Range], wholes: list[dict[str, Tensor]]) -> Tensor:
    """The row means that a rank stores, from those of whole tensors."""
    elements = torch.zeros(geometry.shape, dtype=torch.float64)
    for r, whole in zip(ranges, wholes, strict=True):
        layout = r.layout.rows  # type: ignore[union-attr]
        each = widen(unsharded(layout, r.shape), whole["exp_avg_sq"])
        elements[r.offset : r.offset + r.stop - r.start] = each.flatten()[r.start : r.stop]
    return narrow(geometry, elements)
