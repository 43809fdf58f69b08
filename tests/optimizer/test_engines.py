"""Every engine through the optimizer, over random layouts, fifty steps against the paper's transcription in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimizer import AdamMini
from optimizer.step.reference import initial_state, reference_step
from tests.fuzz.draw import strided
from tests.optimizer.strategies import layouts

ENGINES: list[dict[str, Any]] = [{"fused": True}, {"fused": False}, {"foreach": True}, {"differentiable": True}]
COMMON: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("flags", ENGINES, ids=str)
@settings(max_examples=12, deadline=None)
@given(
    st.lists(layouts(), min_size=1, max_size=3), st.integers(0, 10_000),
    st.sampled_from(["plain", "transposed", "gapped"]), st.booleans(),
)  # fmt: skip
def test_fifty_steps(flags: dict[str, Any], pairs: list[Any], seed: int, how: str, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaf = not flags.get("differentiable")  # autograd keeps no graph through leaves changed in place
    params: list[Any] = [torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape in pairs]
    params = [nn.Parameter(x) if leaf else x.requires_grad_().clone() for x in params]
    optimizer = AdamMini([(f"t{i}", p) for i, p in enumerate(params)], betas=(0.9, 0.95), maximize=maximize, **COMMON,
                         **flags)  # fmt: skip
    optimizer.layouts[0] = [layout for layout, _ in pairs]
    ids = [layout.block_ids(shape) for layout, shape in pairs]
    expected = [p.detach().clone() for p in params]
    states = [initial_state(p, i) for p, i in zip(expected, ids, strict=True)]
    for _ in range(50):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = strided(g, how)
            expected[i] = reference_step(expected[i], g, states[i], ids[i], beta1=0.9, beta2=0.95, maximize=maximize,
                                         **COMMON)  # fmt: skip
        optimizer.step()
    for p, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-12)
