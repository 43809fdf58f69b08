"""The step in tensors throughout: against the paper's transcription, through autograd, and flags torch refuses.

What these tests cannot see: CUDA graphs, for which there is no device here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer import AdamMini, Layout
from optimizer.step.engines.traced import traced_update
from optimizer.step.hyper import Hyper
from optimizer.step.reference import initial_state, reference_step
from tests.fuzz.draw import strided
from tests.optimizer.strategies import layouts


@settings(max_examples=80, deadline=None)
@given(layouts(), st.integers(0, 10_000), st.sampled_from(["plain", "transposed", "gapped"]), st.booleans())
def test_equals_the_reference_in_float64(pair: Any, seed: int, how: str, maximize: bool) -> None:
    layout, shape = pair
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, ids = p.clone(), layout.block_ids(shape)
    state = initial_state(p, ids)
    m, v = torch.zeros_like(p), torch.zeros(layout.aligned_shape(shape), dtype=torch.float64)
    taken = torch.zeros(())
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    for _ in range(3):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        traced_update(p, strided(g, how) * 8, m, v, taken, layout, Hyper(**options, grad_scale=torch.tensor(8.0)))
        expected = reference_step(expected, g, state, ids, **options)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    assert float(taken) == 3


def two_steps(start: Tensor, grads: Tensor, lr: Tensor, beta1: Tensor, beta2: Tensor, decay: Tensor) -> Tensor:
    """The parameter after two differentiable steps, as a function of everything that went in."""
    p = start.clone()
    optimizer = AdamMini(
        [("lm_head.weight", p)], lr=lr, betas=(beta1, beta2), weight_decay=0.0, differentiable=True,
    )  # fmt: skip
    optimizer.param_groups[0]["weight_decay"] = decay
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p


def test_gradients_flow_through_the_step() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.01, 0.9, 0.95, 0.1)]
    assert torch.autograd.gradcheck(two_steps, (start, grads, *numbers))
    ours = two_steps(start, grads, *numbers).detach()
    plain = nn.Parameter(start.detach().clone())
    optimizer = AdamMini([("lm_head.weight", plain)], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    for grad in grads.detach():
        plain.grad = grad
        optimizer.step()
    torch.testing.assert_close(ours, plain.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"foreach": True, "fused": True}, RuntimeError, "exclude each other"),
        ({"fused": True, "differentiable": True}, RuntimeError, "no backward"),
        ({"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr is a tensor"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True}, ValueError, "betas is a tensor"),
        ({"betas": (0.9, torch.tensor(0.99))}, ValueError, "not one of each"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "must be one number"),
        ({"exp_avg_dtype": "int8", "differentiable": True}, RuntimeError, "rounding"),
        ({"bf16_rounding": "up"}, ValueError, "bf16_rounding='up'"),
        ({"capturable": 2}, ValueError, "capturable=2"),
    ],
)
def test_refused_when_built(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdamMini([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize("options", [{"capturable": True}, {"foreach": True, "differentiable": True}])
def test_refused_at_the_step_as_in_torch(options: dict[str, Any]) -> None:
    for make in (torch.optim.AdamW, AdamMini):
        p = nn.Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2)
        optimizer = make([p], **options)
        with pytest.raises(AssertionError):
            optimizer.step()


def test_one_element_tensors_for_every_number() -> None:
    results = []
    for wrap in (float, lambda x: torch.tensor([x])):
        p = nn.Parameter(torch.ones(4, 3))
        optimizer = AdamMini([("lm_head.weight", p)], lr=wrap(0.1), betas=(wrap(0.9), wrap(0.95)))
        for _ in range(3):
            p.grad = torch.arange(12.0).reshape(4, 3)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_layouts_of_whole_tensors_and_empty_ones() -> None:
    p, m, v, step = torch.ones(0, 3), torch.zeros(0, 3), torch.zeros(0, 1), torch.zeros(())
    traced_update(p, p.clone(), m, v, step, Layout(0, []), Hyper(0.1, 0.9, 0.99, 1e-8, 0.0, False))
    assert float(step) == 1
