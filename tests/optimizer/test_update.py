"""The fast update against the paper's transcription, step by step, over random layouts, dtypes and strides.

What these tests cannot see: whether the layouts are the right ones for a model (test_partition.py).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import Layout
from optimizer.step.reference import initial_state, reference_step
from optimizer.step.update import adam_mini_update
from tests.fuzz.draw import strided
from tests.optimizer.strategies import layouts


@settings(max_examples=120, deadline=None)
@given(layouts(), st.integers(0, 10_000), st.sampled_from(["plain", "transposed", "gapped"]), st.booleans())
def test_equals_the_reference_in_float64(pair, seed: int, how: str, maximize: bool) -> None:
    layout, shape = pair
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, ids = p.clone(), layout.block_ids(shape)
    state = initial_state(p, ids)
    m = torch.zeros_like(p)
    v = torch.zeros(layout.aligned_shape(shape), dtype=torch.float64)
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    for step in range(1, 4):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        given_g = strided(g, how)
        adam_mini_update(p, given_g, m, v, layout, step=step, **options)
        expected = reference_step(expected, g, state, ids, **options)
        assert torch.equal(given_g, g), "the gradient was touched"
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    # The aligned second moment is the paper's v_b, spread over the block.
    pieces = v.unflatten(0, (layout.fold, -1)), (layout.fold, shape[0] // layout.fold, *shape[1:])
    spread = pieces[0].expand(pieces[1]).reshape(shape) if layout.fold > 1 else v.expand(shape)
    torch.testing.assert_close(spread, state.v[ids], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_fp32_second_moments(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = Layout(0, [3, 3, 1, 1])
    p = torch.randn(8, 5, generator=generator).to(dtype)
    exact, ids = p.float().clone(), layout.block_ids(p.shape)
    state = initial_state(exact, ids)
    m, v = torch.zeros_like(p), torch.zeros(8, 1)
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    for step in range(1, 6):
        # 1e-4 squared is below the smallest fp16 number: a second moment in fp16 would be zero and divide by eps.
        g = (1e-4 * torch.randn(8, 5, generator=generator)).to(dtype)
        adam_mini_update(p, g, m, v, layout, step=step, **options)
        exact = reference_step(exact, g.float(), state, ids, **options)
    torch.testing.assert_close(v.expand(8, 5), state.v[ids], rtol=1e-5, atol=0)
    torch.testing.assert_close(p.float(), exact, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 0.04))


def test_large_per_element_tensors_go_through_in_pieces() -> None:
    """Pieces of the first axis must change nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (300, 400)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    layout = Layout.per_element(shape)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    expected = p * (1 - 1e-3) - 1e-2 * g / (g.abs() + 1e-8)
    adam_mini_update(
        p, g, m, v, layout, step=1, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, maximize=False
    )
    torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)


def test_expanded_gradient() -> None:
    """The gradient of a sum is an expanded scalar: stride zero everywhere."""
    p, m, v = torch.ones(4, 3), torch.zeros(4, 3), torch.zeros(4, 1)
    g = torch.tensor(2.0).expand(4, 3)
    adam_mini_update(
        p, g, m, v, Layout(0, [2, 2]), step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=0.0, weight_decay=0.0, maximize=False
    )
    torch.testing.assert_close(p, torch.full((4, 3), 0.9))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(0, [1] * 300), (300, 500)),  # rows
        (Layout(0, [150, 150]), (300, 500)),  # blocks that a slice cuts
        (Layout(1, [1] * 500), (300, 500)),  # columns
        (Layout(1, [100] * 5), (3, 500, 100)),  # a first axis of which one index is nearly a slice
        (Layout(1, [2] * 40, leading=(2,)), (2, 80, 1000)),  # experts
    ],
)
@pytest.mark.parametrize("how", ["plain", "transposed"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32),
                                    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])  # fmt: skip
def test_large_tensors_go_through_in_slices(layout: Layout, shape: tuple[int, ...], how: str, dtypes) -> None:
    """Slices change nothing in float64; elsewhere each result is a rounding of the exact one, made once."""
    dtype, moment = dtypes
    generator = torch.Generator().manual_seed(0)
    p, g, m = (strided(torch.randn(shape, generator=generator).to(d), how) for d in (dtype, dtype, moment))
    v = torch.zeros(layout.aligned_shape(shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    exact_m = 0.9 * m.double() + 0.1 * g.double()
    ids = layout.block_ids(shape).flatten()
    square = g.double().square().flatten()
    mean = torch.zeros(layout.n_blocks, dtype=torch.float64).index_add(0, ids, square) / ids.bincount()
    exact_v = 0.05 * mean[ids].reshape(shape)
    before = p.double().clone()
    adam_mini_update(p, g, m, v, layout, step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=0.0, weight_decay=0.1,
                     maximize=False)  # fmt: skip
    torch.testing.assert_close(
        v.expand(shape).double(), exact_v, rtol=1e-12 if v.dtype == torch.float64 else 1e-5, atol=0
    )
    exact_p = 0.99 * before - 0.1 * (m.double() / 0.1) / (exact_v / 0.05).sqrt()
    for ours, exact in ((m, exact_m), (p, exact_p)):
        ulp = {torch.float64: 1e-14, torch.float32: 1e-6}.get(
            ours.dtype, 2.0**-8
        )  # bf16: half a unit in the last place
        error = (ours.double() - exact).abs()
        assert bool((error <= ulp * exact.abs() + (1e-13 if dtype == torch.float64 else 2e-6)).all())
