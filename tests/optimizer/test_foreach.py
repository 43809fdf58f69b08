"""The foreach step against the paper's transcription, over lists of tensors, slices, dtypes and flags.

What these tests cannot see: that a CUDA device takes one launch per chunk, and that no number is read off it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from optimizer import Layout
from optimizer.step.engines.foreach import foreach_update
from optimizer.step.reference import initial_state, reference_step
from tests.fuzz.draw import strided
from tests.optimizer.strategies import layouts

COMMON: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STRIDES = st.sampled_from(["plain", "transposed", "gapped"])


class Group:
    """Parameters with their state, and the reference's beside them."""

    def __init__(self, pairs: list[tuple[Layout, tuple[int, ...]]], seed: int, dtype: torch.dtype = torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        self.layouts = [layout for layout, _ in pairs]
        self.params = [self.random(shape).to(dtype) for _, shape in pairs]
        self.moments = [torch.zeros_like(p) for p in self.params]
        self.seconds = [
            torch.zeros(layout.aligned_shape(p.shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            for layout, p in zip(self.layouts, self.params, strict=True)
        ]
        self.steps = [torch.zeros(()) for _ in pairs]
        self.expected = [p.to(torch.float64, copy=True) for p in self.params]
        self.ids = [layout.block_ids(p.shape) for layout, p in zip(self.layouts, self.params, strict=True)]
        self.states = [initial_state(p, ids) for p, ids in zip(self.expected, self.ids, strict=True)]

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def take(self, grads: list[Tensor], **options: Any) -> None:
        before = [g.clone() for g in grads]
        foreach_update(
            self.params, grads, self.moments, self.seconds, self.steps, self.layouts,
            **{"maximize": False} | COMMON | options,
        )  # fmt: skip
        for g, untouched in zip(grads, before, strict=True):
            assert torch.equal(g, untouched) or bool(g.isnan().any()), "a gradient was touched"

    def refer(self, grads: list[Tensor], *, maximize: bool = False) -> None:
        for i, g in enumerate(grads):
            if g.numel():
                self.expected[i] = reference_step(
                    self.expected[i], g, self.states[i], self.ids[i], maximize=maximize, **COMMON
                )

    def check(self, tolerance: float = 1e-12) -> None:
        for p, expected in zip(self.params, self.expected, strict=True):
            torch.testing.assert_close(p.to(torch.float64), expected, rtol=tolerance, atol=tolerance)

    def tensors(self) -> list[Tensor]:
        return [t.clone() for t in (*self.params, *self.moments, *self.seconds, *self.steps)]


def run(pairs: Any, seed: int, how: str, n: int, **options: Any) -> None:
    group = Group(pairs, seed)
    for _ in range(n):
        grads = [group.random(tuple(p.shape)) for p in group.params]
        group.take([strided(g, how) for g in grads], **options)
        group.refer(grads, maximize=options.get("maximize", False))
    group.check()
    assert [float(t) for t in group.steps] == [n] * len(pairs)


@settings(max_examples=120, deadline=None)
@given(st.lists(layouts(), min_size=1, max_size=3), st.integers(0, 10_000), STRIDES, st.booleans(), st.booleans(),
       st.sampled_from([None, 1, 7, 40]))  # fmt: skip
def test_equals_the_reference_in_float64(
    pairs: Any, seed: int, how: str, maximize: bool, capturable: bool, chunk: int | None
) -> None:
    run(pairs, seed, how, 2, maximize=maximize, capturable=capturable, chunk=chunk)


@settings(max_examples=30, deadline=None)
@given(st.lists(layouts(), min_size=1, max_size=1), st.integers(0, 10_000), STRIDES, st.booleans())
def test_equals_the_reference_over_fifty_steps(pairs: Any, seed: int, how: str, capturable: bool) -> None:
    run(pairs, seed, how, 50, capturable=capturable, chunk=16)


@pytest.mark.parametrize("chunk", [None, 50])
def test_empty_scalar_and_expanded(chunk: int | None) -> None:
    pairs = [(Layout.per_tensor(()), ()), (Layout.per_element((0, 3)), (0, 3)), (Layout(0, [2, 2]), (4, 3)),
             (Layout.per_element((90,)), (90,)), (Layout(1, [1] * 70), (2, 70))]  # fmt: skip
    group = Group(pairs, 0)
    for _ in range(3):
        grads = [group.random(()).expand(p.shape) for p in group.params]
        group.take(grads, chunk=chunk)
        group.refer(grads)
    group.check()
    assert [float(t) for t in group.steps] == [3] * len(pairs)


def test_each_tensor_has_its_own_count() -> None:
    """A parameter whose gradients came late is at its own step, in the same call."""
    pairs = [(Layout(0, [1] * 3), (3, 4)), (Layout(0, [3]), (3, 4))]
    for capturable in (False, True):
        group = Group(pairs, 1)
        early = Group(pairs, 1)
        early.steps[1] += 10
        grads = [group.random((3, 4)) for _ in pairs]
        group.take(grads, capturable=capturable)
        early.take(grads, capturable=capturable)
        assert torch.equal(group.params[0], early.params[0])
        assert not torch.equal(group.params[1], early.params[1])


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_mix_and_round_once(dtype: torch.dtype, moment: torch.dtype) -> None:
    pairs = [(Layout(0, [3, 3, 1, 1]), (8, 5)), (Layout.per_element((9,)), (9,)), (Layout(1, [4, 4]), (3, 8))]
    for chunk in (None, 6):
        group = Group(pairs, 2, dtype)
        group.moments = [m.to(moment) for m in group.moments]
        # 1e-4 squared is below the smallest fp16 number: second moments in fp16 would be zero.
        grads = [(1e-4 * group.random(tuple(p.shape))).to(dtype) for p in group.params]
        group.take(grads, chunk=chunk)
        group.refer([g.to(torch.float64) for g in grads])
        eps = torch.finfo(dtype).eps
        for p, expected in zip(group.params, group.expected, strict=True):
            # Rounded once: half a unit in the last place, and what fp32 arithmetic adds; the moment is not read back.
            error = (p.to(torch.float64) - expected).abs()
            assert bool((error <= (0.51 * eps + 2e-6) * expected.abs() + 1e-7).all())


def test_large_fp16_gradients_do_not_overflow() -> None:
    group = Group([(Layout(0, [1] * 4), (4, 600)), (Layout.per_tensor((70, 7)), (70, 7))], 3, torch.float16)
    for chunk in (None, 64):
        group.take([torch.full(p.shape, 6e4, dtype=torch.float16) for p in group.params], chunk=chunk)
    for v, share in zip(group.seconds, (1, 1), strict=True):
        torch.testing.assert_close(v, torch.full_like(v, share * 3.6e9 * (1 - 0.95**2)), rtol=1e-3, atol=0)
    assert all(bool(p.isfinite().all()) for p in group.params)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_as_hyper_parameters(capturable: bool) -> None:
    pairs = [(Layout(0, [2, 1]), (3, 4)), (Layout.per_element((5,)), (5,))]
    numbers, tensors = Group(pairs, 4), Group(pairs, 4)
    for _ in range(3):
        grads = [numbers.random(tuple(p.shape)) for p in numbers.params]
        numbers.take(grads)
        given_tensors = {k: torch.tensor([COMMON[k]], dtype=torch.float64) for k in ("lr", "beta1", "beta2")}
        tensors.take(grads, capturable=capturable, **given_tensors)
    for a, b in zip(numbers.tensors(), tensors.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_scaled_gradients(capturable: bool, maximize: bool) -> None:
    pairs = [(Layout(0, [2, 1]), (3, 4)), (Layout.per_element((5,)), (5,)), (Layout.per_tensor(()), ())]
    plain, scaled = Group(pairs, 5), Group(pairs, 5)
    options = {"capturable": capturable, "maximize": maximize, "chunk": 4}
    for step in range(4):
        grads = [plain.random(tuple(p.shape)) for p in plain.params]
        overflow = step == 2
        if not overflow:
            plain.take(grads, **options)
        large = [g * 1024 for g in grads]
        if overflow:
            large[0][1, 1], large[1][2], large[2] = torch.inf, torch.nan, torch.tensor(torch.nan, dtype=torch.float64)
        before = scaled.tensors()
        scaled.take(large, grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor([float(overflow)]), **options)
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(before, scaled.tensors(), strict=True))
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def largest_temporaries(group: Group, grads: list[Tensor], **options: Any) -> int:
    """The most bytes that a step holds at any one time beyond what is there before and after."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        foreach_update(
            group.params, grads, group.moments, group.seconds, group.steps, group.layouts,
            **{"maximize": False} | COMMON | options,
        )  # fmt: skip
    held = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_stay_under_a_twentieth_of_the_group(dtype: torch.dtype) -> None:
    square = (1024, 1024)
    pairs = [(Layout(0, [1] * 1024), square), (Layout(1, [1] * 1024), square), (Layout(0, [64] * 16), square),
             (Layout.per_tensor(square), square), (Layout.per_element(square), square),
             (Layout(1, [1] * 512, leading=(4,)), (4, 512, 512))]  # fmt: skip
    pairs += [(Layout.per_element((512,)), (512,))] * 30
    group = Group.__new__(Group)
    group.layouts = [layout for layout, _ in pairs]
    group.params, grads, group.moments = ([torch.ones(shape, dtype=dtype) for _, shape in pairs] for _ in range(3))
    group.seconds = [torch.zeros(layout.aligned_shape(shape)) for layout, shape in pairs]
    group.steps = [torch.zeros(()) for _ in pairs]
    total = sum(t.nbytes for t in (*group.params, *grads, *group.moments, *group.seconds))
    for options in ({}, {"maximize": True}, {"grad_scale": torch.tensor(2.0)}):
        assert 0 < largest_temporaries(group, grads, **options) <= 0.05 * total


def test_lr_does_not_recompile() -> None:
    """Traced without a break, and a tensor's new value is a new value, not a new program."""
    pairs = [
        (Layout(0, [2, 1]), (3, 4)),
        (Layout.per_element((5,)), (5,)),
        (Layout(2, [1] * 3, leading=(2,)), (2, 4, 3)),
    ]
    group, eager = Group(pairs, 6), Group(pairs, 6)
    compiled = torch.compile(foreach_update, fullgraph=True, backend="aot_eager")
    for lr in (1e-2, 2e-2, 3e-2):
        grads = [group.random(tuple(p.shape)) for p in group.params]
        options = COMMON | {"lr": torch.tensor(lr, dtype=torch.float64), "maximize": False}
        with torch.no_grad(), torch.compiler.set_stance("default" if lr == 1e-2 else "fail_on_recompile"):
            compiled(group.params, grads, group.moments, group.seconds, group.steps, group.layouts, **options)
        eager.take(grads, lr=lr)
    for a, b in zip(group.tensors(), eager.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
