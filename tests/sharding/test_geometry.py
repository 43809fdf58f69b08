"""What every rank holds, sends and keeps, in one process, for random shapes, layouts, meshes and placements.

The groups are of torch's fake backend, which sends nothing; the test sums what each rank would send. What a rank
holds is found out by torch itself (``distribute_tensor`` of numbered elements), or by cutting as FSDP2 does.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from optimizer import Layout
from optimizer.partition.layout import Runs
from optimizer.partition.roles import viewed
from optimizer.sharding import exchange
from optimizer.sharding.cut_update import cut_update
from optimizer.sharding.flat import Range, flat_geometry
from optimizer.sharding.geometry import Geometry
from optimizer.sharding.placed import placed_geometry
from optimizer.step.update import adam_mini_update
from tests.sharding.in_one_process import NUMBERS, ranks, share


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout]:
    """A shape and a layout that fits it."""
    fold = draw(st.sampled_from((1, 1, 1, 2, 3)))
    shape = draw(st.lists(st.integers(1, 7), min_size=1 if fold == 1 else 2, max_size=3).map(tuple))
    if fold > 1:
        shape = (fold * shape[0], *shape[1:])
    view = viewed(shape, fold)
    axis = draw(st.integers(min(fold - 1, 1), len(view) - 1))
    lead = draw(st.integers(min(fold - 1, 1), axis))
    cuts = draw(st.sets(st.integers(1, max(1, view[axis] - 1)), max_size=4)) if view[axis] > 1 else set()
    edges = [0, *sorted(cuts), view[axis]]
    return shape, Layout(axis, Runs.of(b - a for a, b in itertools.pairwise(edges)), view[:lead], fold=fold)


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, tuple[int, ...], list[Any]]:
    shape, layout = draw(tensors())
    mesh = draw(st.sampled_from([(2,), (3,), (4,), (2, 2), (3, 2), (2, 3)]))
    dims = st.integers(0, len(shape) - 1)
    if len(mesh) == 2 and draw(st.booleans()):  # FSDP2 over tensor parallelism along one axis
        dim = draw(dims)
        return shape, layout, mesh, [_StridedShard(dim, split_factor=mesh[1]), Shard(dim)]
    return shape, layout, mesh, [draw(st.one_of(st.just(Replicate()), dims.map(Shard))) for _ in mesh]


def _expected(shape: tuple[int, ...], layout: Layout) -> list[Tensor]:
    """(parameter, gradient, moment, second moment before, parameter, moment, second moment after)."""
    generator = torch.Generator().manual_seed(0)
    p, g, m = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    ids = layout.block_ids(shape).flatten()
    per_block = torch.rand(layout.n_blocks, dtype=torch.float64, generator=generator)
    number = torch.arange(prod(layout.aligned_shape(shape)))
    v = torch.zeros(len(number), dtype=torch.float64)
    v[_aligned(number.view(layout.aligned_shape(shape)), shape, layout).flatten()] = per_block[ids]
    v = v.view(layout.aligned_shape(shape))
    after = [t.clone() for t in (p, m, v)]
    adam_mini_update(after[0], g, after[1], after[2], layout, step=3, **NUMBERS)
    return [p, g, m, v, *after]


def _aligned(values: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """Aligned values spread over the tensor."""
    view = viewed(shape, layout.fold)
    return values.reshape(layout.unfolded().aligned_shape(view)).expand(view).reshape(shape)


def _summed(geometries: list[Geometry], groups: list[list[tuple[int, ...]]], grads: list[Tensor]) -> list[Tensor]:
    """Block means as the ranks would have them after their messages."""
    shares = [
        None if p.cut is None else exchange._local_share(p, g, g.dtype) for p, g in zip(geometries, grads, strict=True)
    ]
    sent: list[Any] = []
    for geometry, own_share in zip(geometries, shares, strict=True):
        if geometry.cut is None:
            sent.append(None)
            continue
        message = torch.zeros(geometry.cut.size, dtype=torch.float64)
        message[geometry.cut.positions] = own_share[geometry.cut.slots]
        sent.append(message)
    for stage in range(max(map(len, groups), default=0)):
        before = list(sent)
        for rank, own in enumerate(groups):
            if stage < len(own):
                members = own[stage]
                # Nobody waits in vain: all ranks of the group send as much, for the same group.
                assert all(groups[other][stage : stage + 1] == [members] for other in members)
                assert len({len(before[other]) for other in members}) == 1
                sent[rank] = torch.stack([before[other] for other in members]).sum(0)
    for geometry, own_share, message in zip(geometries, shares, sent, strict=True):
        if own_share is not None:
            own_share[geometry.cut.slots] = message[geometry.cut.positions]  # type: ignore[union-attr]
    return shares


def _step(geometry: Geometry, means: Tensor, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    if geometry.cut is not None:
        cut_update(geometry, p, g, {"exp_avg": m, "exp_avg_sq": v}, exchange.Means(means), step=3, **NUMBERS)
    for part in geometry.free if geometry.cut is not None else geometry.boxes[:1]:  # what an engine would take
        box = part.of(p)
        second = part.of_second(v, tuple(box.shape))
        adam_mini_update(box, part.of(g), part.of(m), second, part.layout, step=3, **NUMBERS)


def _require_cause(layout: Layout, shape: tuple[int, ...], held: list[Tensor], groups: list[list[Any]]) -> None:
    """A group communicates only where a block lies on ranks that differ in more than copies."""
    ids = layout.block_ids(shape).flatten()
    apart = any(
        not set(a.tolist()) & set(b.tolist()) and set(ids[a].tolist()) & set(ids[b].tolist())
        for a, b in itertools.combinations([h.flatten() for h in held], 2)
    )
    assert apart or not any(groups)


@given(placed())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(((7,), Layout(0, [7]), (3, 2), [_StridedShard(0, split_factor=2), Shard(0)]))
@example(((6, 4), Layout(2, [1] * 4, (2,), fold=2), (3,), [Shard(0)]))  # matrices cut inside
@example(((6, 4), Layout(2, [1] * 4, (2,), fold=2), (2,), [Shard(0)]))  # whole matrices
@example(((6, 1), Layout(0, [2, 2, 2]), (2, 2), [Shard(0), Shard(1)]))
@example(((1, 5), Layout(1, [1] * 5), (3,), [Shard(0)]))
@example(((2, 5), Layout(1, [2, 3]), (3, 2), [Shard(0), Shard(1)]))
def test_placed_pieces_step_as_the_whole(case: tuple[Any, ...]) -> None:
    shape, layout, mesh_shape, placements = case
    before_p, g, m, v, after_p, after_m, after_v = _expected(shape, layout)
    geometries, groups, held, held_v = [], [], [], []
    for _ in ranks(prod(mesh_shape)):
        mesh = init_device_mesh("cpu", mesh_shape)
        numbers = share(torch.arange(prod(shape)).view(shape), mesh, placements)
        parameter = DTensor.from_local(numbers.double(), mesh, placements, run_check=False, shape=torch.Size(shape),
                                       stride=torch.empty(shape, device="meta").stride())  # fmt: skip
        geometry = placed_geometry(parameter, layout)
        assert geometry.placed is not None and geometry.placed.shape == layout.aligned_shape(shape)
        geometries.append(geometry)
        groups.append([exchange.ranks_of(group) for group in (geometry.cut.groups if geometry.cut else ())])
        held.append(numbers)
        aligned = torch.arange(v.numel()).view(v.shape)
        held_v.append(share(aligned, mesh, list(geometry.placed.placements)))
    _require_cause(layout, shape, held, groups)
    means = _summed(geometries, groups, [g.flatten()[index] for index in held])
    for geometry, index, index_v, mean in zip(geometries, held, held_v, means, strict=True):
        assert geometry.cut is None or geometry.cut.size <= layout.n_blocks
        p, own_m, own_v = before_p.flatten()[index], m.flatten()[index], v.flatten()[index_v]
        assert tuple(own_v.shape) == geometry.aligned
        _step(geometry, mean, p, g.flatten()[index], own_m, own_v)
        for ours, whole, at in ((p, after_p, index), (own_m, after_m, index), (own_v, after_v, index_v)):
            torch.testing.assert_close(ours, whole.flatten()[at], rtol=1e-12, atol=1e-12)


@st.composite
def flattened(draw: st.DrawFn) -> tuple[list[tuple[tuple[int, ...], Layout]], int, int]:
    """Tensors laid end to end, ranks, padding in front of each."""
    return draw(st.lists(tensors(), min_size=1, max_size=3)), draw(st.integers(1, 5)), draw(st.integers(0, 2))


@given(flattened())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(([((5, 4), Layout(0, [2, 3])), ((3,), Layout.per_element((3,)))], 3, 1))
@example(([((3, 4, 5), Layout(2, [1] * 5, (3,)))], 4, 0))
def test_flat_pieces_step_as_the_whole(case: tuple[Any, ...]) -> None:
    several, world, padding = case
    wholes = [_expected(shape, layout) for shape, layout in several]
    starts, at = [], 0
    for shape, _ in several:
        starts.append(at + padding)
        at += padding + prod(shape)
    size = -(-at // world)
    bounds = [
        tuple((max(r * size, s) - s, min((r + 1) * size, s + prod(shape)) - s) for r in range(world))
        for s, (shape, _) in zip(starts, several, strict=True)
    ]
    bounds = [tuple((a, b) if a < b else (0, 0) for a, b in own) for own in bounds]
    geometries, groups, local = [], [], []
    for rank in ranks(world):
        ranges = [
            Range(shape, layout, own, rank, max(s - rank * size, 0))
            for (shape, layout), own, s in zip(several, bounds, starts, strict=True)
        ]
        geometries.append(flat_geometry(ranges, size, dist.group.WORLD, torch.device("cpu")))
        groups.append([exchange.ranks_of(group) for group in (geometries[-1].cut.groups if geometries[-1].cut else ())])
        local.append(ranges)

    def spread(which: int, ranges: list[Range]) -> Tensor:
        out = torch.full((size,), 7.0, dtype=torch.float64)
        for r, whole in zip(ranges, wholes, strict=True):
            out[r.offset : r.offset + r.stop - r.start] = whole[which].flatten()[r.start : r.stop]
        return out

    means = _summed(geometries, groups, [spread(1, ranges) for ranges in local])
    for geometry, ranges, mean in zip(geometries, local, means, strict=True):
        p, g, m, v = spread(0, ranges), spread(1, ranges), spread(2, ranges), torch.zeros(geometry.aligned).double()
        wide = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]  # second moments, one value per element
        for r, (shape, layout), whole in zip(ranges, several, wholes, strict=True):
            for out, values in zip(wide, (whole[3], whole[6]), strict=True):
                out[r.offset : r.offset + r.stop - r.start] = _aligned(values, shape, layout).flatten()[
                    r.start : r.stop
                ]
        for part in geometry.boxes:
            box = part.of(wide[0])
            second = part.of_second(v, tuple(box.shape))
            shared = [d for d, n in enumerate(second.shape) if n != box.shape[d]]
            second.copy_(box.amax(shared, keepdim=True) if shared else box)
        _step(geometry, mean, p, g, m, v)
        for which, ours in ((4, p), (5, m)):
            wanted = spread(which, ranges)
            real = spread(0, ranges) != 7.0
            torch.testing.assert_close(ours[real], wanted[real], rtol=1e-12, atol=1e-12)
        for part in geometry.boxes:
            box = part.of(wide[1])
            second = part.of_second(v, tuple(box.shape)).expand_as(box)
            torch.testing.assert_close(second, box, rtol=1e-12, atol=1e-12)


def test_partial_is_refused_by_name() -> None:
    from torch.distributed.tensor import Partial

    for _ in ranks(1):
        mesh = init_device_mesh("cpu", (1,))
        parameter = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False)
        with pytest.raises(ValueError, match=r"placement Partial .* redistribute it"):
            placed_geometry(parameter, Layout(0, [1, 1]), "parameter 'w'")
