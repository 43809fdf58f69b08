"""The native step under any strides: what a loop over memory would read and write in the wrong places.

What these tests cannot see: whether contiguous tensors are stepped right (test_native.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer import AdamMini, Layout
from optimizer.step.engines import native
from optimizer.step.reference import initial_state, reference_step
from tests.optimizer.strategies import layouts

HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def placed(x: Tensor, order: list[int], gap: int, expanded: int | None = None) -> Tensor:
    """The same values with axes in another order in memory, with gaps; along one axis the first index's, expanded."""
    if expanded is not None and x.dim():
        axis = expanded % x.dim()
        return placed(x.narrow(axis, 0, 1), order, gap).expand(x.shape)
    axes = sorted(range(x.dim()), key=lambda d: order[d % len(order)] * 16 + d)
    back = [axes.index(d) for d in range(x.dim())]
    room = torch.full((*(x.shape[d] + gap for d in axes), 1 + gap), float("nan"), dtype=x.dtype)
    view = room[..., 0]
    for d in range(x.dim()):
        view = view.narrow(d, gap, x.shape[axes[d]])
    view = view.permute(back)
    return view.copy_(x)


@st.composite
def placements(draw) -> tuple[list[int], int]:
    return draw(st.permutations(range(5))), draw(st.sampled_from([0, 0, 1]))


@settings(max_examples=120, deadline=None)
@given(
    layouts(), st.integers(0, 10_000), placements(), placements(), placements(), st.none() | st.integers(0, 4),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_equals_the_reference_in_float64(
    pair: Any, seed: int, of_p: Any, of_g: Any, of_m: Any, expanded: int | None, alike: bool, elementwise: bool
) -> None:
    layout, shape = pair
    if elementwise:
        layout = Layout.per_element(shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    p, expected, ids = placed(start, *of_p), start.clone(), layout.block_ids(shape)
    reference = initial_state(expected, ids)
    state = {
        "step": torch.zeros(()),
        "exp_avg": placed(torch.zeros_like(start), *(of_p if alike else of_m)),
        "exp_avg_sq": torch.zeros(layout.aligned_shape(shape), dtype=torch.float64),
    }
    for _ in range(3):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        g = placed(values, *(of_p if alike else of_g), None if alike else expanded)
        before = g.clone()
        ready = native.prepare(p, g, state, layout)
        assert ready is not None, native.obstacle(p, g, state)
        batches = native.Batches(1)
        batches.add(ready, p, g)
        batches.step(maximize=False, **HYPER)
        expected = reference_step(expected, before, reference, ids, **HYPER)
        assert torch.equal(g, before), "the gradient was touched"
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    room = p._base
    if room is not None and room.isnan().any():
        assert int(room.isnan().sum()) == room.numel() - p.numel(), "memory between the elements was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", ["adam_mini", "slim_adam", "elementwise"])
def test_channels_last_and_transposed_weights(dtype: torch.dtype, rules: str) -> None:
    """As a contiguous copy; one optimizer, several steps, gradients as torch leaves them and expanded ones."""
    made = []
    for plain in (True, False):
        torch.manual_seed(0)
        shapes = {"conv.weight": (16, 12, 3, 3), "lm_head.weight": (70, 90), "norm.weight": (90,)}
        values = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        if not plain:
            values["conv.weight"] = values["conv.weight"].to(memory_format=torch.channels_last)
            values["lm_head.weight"] = values["lm_head.weight"].t().contiguous().t()
            values["norm.weight"] = torch.stack([values["norm.weight"]] * 2, -1)[..., 0]
        parameters = {name: nn.Parameter(value) for name, value in values.items()}
        optimizer = AdamMini(parameters.items(), lr=1e-2, rules=rules, fused=True)
        for k in range(3):
            for p in parameters.values():
                g = torch.randn(p.shape).to(dtype)
                p.grad = torch.ones(1, dtype=dtype).expand(p.shape) if k == 1 else g
            optimizer.step()
        made.append(parameters)
    for name, p in made[0].items():
        # Sums run in another order, so v may differ in its last bit, and a rounded weight in its own.
        torch.testing.assert_close(made[1][name], p, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
        assert made[1][name].is_contiguous() is False


def test_strides_that_change_between_steps() -> None:
    """The same optimizer is given gradients of one layout in memory, then another: none is read as the one before."""
    p, q = (nn.Parameter(torch.ones(6, 8)) for _ in range(2))
    native_one, eager = (AdamMini([("lm_head.weight", x)], lr=0.1, fused=f) for x, f in ((p, True), (q, False)))
    for k in range(6):
        g = torch.randn(6, 8, generator=torch.Generator().manual_seed(k))
        p.grad = [g, g.t().contiguous().t(), g[:, :1].expand(6, 8)][k % 3]
        q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        native_one.step()
        eager.step()
        torch.testing.assert_close(p, q)


def test_elements_that_share_memory_are_not_taken() -> None:
    p = torch.zeros(1, 4).expand(3, 4)
    state: dict[str, Tensor] = {}
    assert "share memory" in str(native.obstacle(p, torch.zeros(3, 4), state))
    overlapping = torch.zeros(10).as_strided((3, 4), (2, 1))
    assert "share memory" in str(native.obstacle(overlapping, torch.zeros(3, 4), state))


def test_negative_views_are_not_read_as_they_lie() -> None:
    """Autograd hands such gradients on: the imaginary part of a conjugate, here of one number."""
    p = nn.Parameter(torch.ones(1))
    for _ in range(2):
        p.grad = torch.conj(torch.tensor([1.0 + 2.0j])).imag
        assert p.grad.is_neg() and float(p.grad) == -2.0
        optimizer = AdamMini([("norm.weight", p)], lr=0.1, eps=0.0)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.2]))
