"""Ways of the native loop through memory: none changes a bit of a step, and the fastest one is found."""

from __future__ import annotations

import copy
import ctypes
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer import AdamMini, Layout
from optimizer.partition import FactoredLayout
from optimizer.step.engines import native
from optimizer.step.engines.dispatch import Engines
from optimizer.step.engines.native import step as native_step
from optimizer.step.engines.native import ways
from optimizer.step.engines.native.ways import DEFAULT, LARGE, OTHERS, PAIRS, ROUNDS, TRIALS, Chooser, Way
from optimizer.step.moments import FORMATS, zero_state
from tests.optimizer.strategies import factored_layouts, layouts

SMALL = Way(chunk=4, strip=3, ahead=1, fetch=0)
"""A way that cuts small tensors too."""


class Fixed(Chooser):
    """Goes one way for ever."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way

    def took(self, seconds: float, elements: int) -> None:
        pass


def stepped(way: Way, layout: Any, p: Tensor, gradients: list[Tensor], state: dict[str, Tensor]) -> list[Tensor]:
    """Step copies of the tensors; return them."""
    p, state = p.clone(), {name: tensor.clone() for name, tensor in state.items()}
    for g in gradients:
        ready = native.prepare(p, g, state, layout, seed=3)
        assert ready is not None
        batches = native.Batches(1, Fixed(way))
        batches.add(ready, p, g)
        batches.step(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, maximize=False)
    return [p, *state.values()]


def second_moments(layout: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if not isinstance(layout, FactoredLayout):
        return {"exp_avg_sq": torch.zeros(layout.aligned_shape(shape))}
    return {
        "exp_avg_sq": torch.zeros(layout.aligned_shape(shape)),
        "exp_avg_sq_col": torch.zeros(layout.columns_shape(shape)),
    }


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(layouts(), factored_layouts()),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.sampled_from([SMALL, *OTHERS]),
    st.integers(0, 1000),
)
def test_no_way_changes_a_bit(pair: Any, moment: str, way: Way, seed: int) -> None:
    layout, shape = pair
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(2)]
    if moment in FORMATS and len(shape) >= 2:
        first = zero_state(p, FORMATS[moment])
    else:
        first = {"exp_avg": torch.zeros(shape, dtype=torch.bfloat16 if moment == "bf16" else torch.float32)}
    state = {**first, "step": torch.zeros(()), **second_moments(layout, shape)}
    for one, other in zip(
        stepped(DEFAULT, layout, p, gradients, state), stepped(way, layout, p, gradients, state), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", OTHERS, ids=str)
def test_no_way_changes_a_bit_of_large_tensors(restored_threads: None, way: Way) -> None:
    """Rows, many columns, runs that threads share and quantised rows, on two threads."""
    torch.set_num_threads(2)
    cases = [((130, 3000), 0), ((70, 6000), 1), ((3, 500_000), 0)]
    for shape, axis in cases:
        layout = Layout(axis, [1] * shape[axis])
        p, g = torch.randn(shape), torch.randn(shape)
        for moment in ({"exp_avg": torch.zeros(shape)}, zero_state(p, FORMATS["int8"])):
            state = {**moment, "step": torch.zeros(()), "exp_avg_sq": torch.zeros(layout.aligned_shape(shape))}
            results = (stepped(each, layout, p, [g, 2 * g], state) for each in (DEFAULT, way))
            assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def chosen(seconds: dict[Way, float], steps: int = TRIALS, elements: int = LARGE) -> Chooser:
    """Choose among ways that take these seconds, 1 where none are given."""
    chooser = Chooser()
    for _ in range(steps):
        chooser.took(seconds.get(chooser.way, 1.0), elements)
    return chooser


FEW, NONE = Way(strip=1024), Way(fetch=0)


def test_the_fastest_numbers_are_put_together() -> None:
    both = Way(strip=1024, fetch=0)
    result = chosen({FEW: 0.9, NONE: 0.8, Way(strip=1 << 14): 0.95, both: 0.7})
    assert result.settled and result.way == both


@pytest.mark.parametrize(
    "seconds",
    [
        {},
        {FEW: 0.98},  # too little to be worth it
        {FEW: 0.9, NONE: 0.9, Way(strip=1024, fetch=0): 1.1},  # good alone, bad together
        {FEW: 1.2, NONE: 1.5},
    ],
)
def test_otherwise_the_default_stays(seconds: dict[Way, float]) -> None:
    result = chosen(seconds)
    assert result.settled and result.way == DEFAULT


def test_every_way_is_timed_in_turns_and_one_slow_step_decides_nothing() -> None:
    chooser, order = Chooser(), []
    for step in range(ROUNDS * (len(OTHERS) + 1)):
        order.append(chooser.way)
        chooser.took(50.0 if step < len(OTHERS) + 1 else (0.5 if chooser.way == NONE else 1.0), LARGE)
    assert order == [DEFAULT, *OTHERS] * ROUNDS
    for _ in range(2 * PAIRS):
        chooser.took(0.5 if chooser.way == NONE else 1.0, LARGE)
    assert chooser.settled and chooser.way == NONE


def test_a_busy_machine_decides_nothing() -> None:
    generator = random.Random(0)
    chosen_ways = []
    for _ in range(200):
        chooser = Chooser()
        for _ in range(TRIALS):
            chooser.took(generator.lognormvariate(0, 1), LARGE)
        chosen_ways.append(chooser.way)
    assert chosen_ways.count(DEFAULT) >= 195


def test_steps_of_another_size_are_compared_by_element_and_small_ones_not_at_all() -> None:
    chooser = Chooser()
    for step in range(TRIALS):
        size = LARGE * (1 + step % 3)
        chooser.took((0.5 if chooser.way == FEW else 1.0) * size, size)
    assert chooser.way == FEW
    assert chosen({DEFAULT: 9.0}, elements=LARGE - 1).way == DEFAULT and not chosen({}, elements=LARGE - 1).settled


def test_training_tries_every_way_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Way, int]] = []
    took = Chooser.took
    monkeypatch.setattr(Chooser, "took", lambda self, s, n: (tried.append((self.way, n)), took(self, s, n))[1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 40))
    other = copy.deepcopy(model)
    weights = []
    for each, large in ((model, 1), (other, 1 << 60)):
        monkeypatch.setattr(ways, "LARGE", large)
        optimizer = AdamMini(each, lr=1e-2, fused=True)
        for step in range(TRIALS + 3):
            each(torch.full((4, 96), 1.0 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.clone() for p in each.parameters()])
    assert {way for way, _ in tried} >= {DEFAULT, *OTHERS}
    assert {n for _, n in tried} == {96 * 80 + 80 * 40, 80 + 40}  # with and without weight decay
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_other_layouts_begin_anew() -> None:
    """What was timed with the old ones says nothing of the new ones."""
    engines = Engines()
    engines._choosers[0].took(1.0, LARGE)
    assert engines._choosers[0].way != DEFAULT
    engines.forget()
    assert engines._choosers[0].way == DEFAULT


def test_the_way_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Way] = []

    def loop(*arguments: Any) -> None:
        given.append(Way(*(ctypes.c_int64 * 4).from_address(arguments[-1])))

    p, g = torch.zeros(4, 8), torch.ones(4, 8)
    state = {"exp_avg": torch.zeros(4, 8), "exp_avg_sq": torch.zeros(4, 1), "step": torch.zeros(())}
    ready = native.prepare(p, g, state, Layout(0, [1] * 4))
    assert ready is not None
    monkeypatch.setattr(native_step, "library", lambda: SimpleNamespace(adam_mini_step=loop))
    for chooser in (Fixed(SMALL), None):
        batches = native.Batches(1, chooser)
        batches.add(ready, p, g)
        batches.step(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, maximize=False)
    assert given == [SMALL, DEFAULT]
