"""Quantised first moments of flat tensors in one process: what every rank stores, and what it is by element.

What one process stores is the yardstick: every rank must have the same codes and scales for the blocks that it has
whole.
"""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer import AdamMini, Layout
from optimizer.sharding.flat import Range, flat_geometry
from optimizer.sharding.flat_moments import FlatMoment
from optimizer.sharding.moment_forms import by_element
from optimizer.state.first_moments import joined, spread
from optimizer.step.moments import FORMATS, Format, quantise, quantises, row_axes
from tests.sharding.models import MODELS, batches, loss_of

SHAPES = [(70, 71), (33, 201), (9, 500), (5,), (40, 12, 9, 3), (64, 64), (3, 50, 77)]
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)


def whole(shape: tuple[int, ...], format: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of one process, flattened, and the value and the scale of each element."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape)))
    if not quantises(shape):
        return torch.zeros(0), torch.zeros(0), m.flatten(), torch.zeros(m.numel())
    n = prod(shape[-row_axes(shape) :])
    codes, scale = quantise(m.view(-1, n), format, step=1, seed=1)
    values, scales = spread(codes, scale, n, torch.float32)
    return codes.flatten(), scale.flatten(), values.flatten(), scales.flatten()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FORMATS.values())), st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.data())
def test_every_rank_stores_the_blocks_of_one_process(
    format: Format, shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, 5))
    wholes = [whole(shape, format) for shape in shapes]
    values, scales = (torch.cat([w[k] for w in wholes]) for k in (2, 3))
    size = -(-len(values) // world)
    for rank in range(world):
        ranges, at = [], 0
        for shape in shapes:
            bounds = [(max(at, r * size) - at, min(at + prod(shape), (r + 1) * size) - at) for r in range(world)]
            bounds = [(a, b) if a < b else (0, 0) for a, b in bounds]
            ranges.append(Range(shape, Layout(0, [1] * shape[0]), tuple(bounds), rank, max(at - rank * size, 0)))
            at += prod(shape)
        flat = FlatMoment(ranges, size, format, torch.float32)
        if flat.format is None:
            continue
        own = [
            torch.nn.functional.pad(x[rank * size :][:size], (0, max(0, (rank + 1) * size - at)))
            for x in (values, scales)
        ]
        state = flat.quantised(*own, step=3, seed=4)
        assert {name: tuple(x.shape) for name, x in state.items()} == dict(zip(state, flat.shapes, strict=True))
        for x, y in zip(flat.by_element(*state.values()), own, strict=True):
            assert torch.equal(x, y)
        for stored, (codes, scale, _, _) in zip(flat.stored, wholes, strict=True):
            if stored.n:
                count = stored.scales[1] - stored.scales[0]
                assert torch.equal(state["exp_avg_scale"][slice(*stored.scales)], scale[stored.first_block :][:count])
            if stored.n and stored.source.stop - stored.source.start == prod(stored.source.shape):
                assert torch.equal(state["exp_avg"][slice(*stored.codes)], codes)
        geometry = flat_geometry(ranges, size, None, torch.device("cpu"), quantised=True)
        for box in geometry.free:  # an engine finds the same values in the views that it is given
            views = flat.box_state(box, *state.values())
            if "exp_avg_scale" in views:
                found = spread(*views.values(), box.row, torch.float32)[0].flatten()
                assert torch.equal(found, own[0][box.start : box.stop])


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_by_element(format: Format, dtype: torch.dtype) -> None:
    m = torch.randn(7, 201, dtype=dtype) * 10.0 ** torch.arange(-9, 5, 2).view(7, 1)
    m[2], m[3, 5] = 0, float("nan")
    codes, scale = quantise(m, format, step=1, seed=3)
    again = joined(*spread(codes, scale, 201, dtype), format, step=9, seed=9)
    assert torch.equal(codes, again[0]) and torch.equal(scale.view(torch.uint8), again[1].view(torch.uint8))


@formats
def test_a_block_of_two_scales_is_quantised_anew_and_its_neighbours_are_not(format: Format) -> None:
    codes, scale = quantise(torch.randn(3, 4 * format.block), format, step=1, seed=3)
    values, scales = spread(codes, scale, 4 * format.block, torch.float32)
    values[1, 5], scales[1, 5] = 8 * values[1].abs().max(), 8 * scales[1].max()
    new_codes, new_scale = joined(values, scales, format, step=9, seed=9)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 0] = False
    assert torch.equal(new_scale == scale, same)
    assert torch.equal((new_codes == codes).view(3, 4, -1).all(-1), same)


@formats
def test_a_document_by_element_loads_into_one_process(format: Format) -> None:
    """Torch gathers the state of FSDP1 in this form."""
    model = MODELS["wide"]()
    optimizer = AdamMini(model, exp_avg_dtype=format.name)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batches(step, 1)[0]).backward()
        optimizer.step()
    wanted, document = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    for parameter, (key, state) in zip(optimizer.state, list(document["state"].items()), strict=True):
        if "exp_avg_scale" in state:
            axes = row_axes(parameter.shape)
            both = by_element(state["exp_avg"], state["exp_avg_scale"], tuple(parameter.shape), axes, torch.float32)
        else:
            both = state["exp_avg"], torch.zeros_like(parameter)
        document["state"][key] = {**state, "exp_avg": both[0].clone(), "exp_avg_scale": both[1].clone()}
    optimizer.load_state_dict(document)
    for key, state in optimizer.state_dict()["state"].items():
        assert state.keys() == wanted["state"][key].keys()
        assert all(torch.equal(state[name], x) for name, x in wanted["state"][key].items())
