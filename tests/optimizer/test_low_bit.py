"""The optimizer with first moments in few bits and bf16 parameters without a master copy.

What these tests cannot see: whether training is as good with them (docs/low_bit.md measures that).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini
from optimizer.memory import CPUOffload, gradient_release
from tests.optimizer.models import GPT, Llama, batch, loss_of

CASES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"exp_avg_dtype": "int8"}),
    (torch.float32, {"exp_avg_dtype": "int4"}),
    (torch.float64, {"exp_avg_dtype": "int8"}),
    (torch.bfloat16, {"exp_avg_dtype": "int8", "bf16_rounding": "kahan"}),
    (torch.bfloat16, {"bf16_rounding": "stochastic"}),
    (torch.bfloat16, {"bf16_rounding": "kahan"}),
    (torch.bfloat16, {"exp_avg_dtype": "int4", "bf16_rounding": "stochastic"}),
]


def large(dtype: torch.dtype) -> nn.Module:
    """Large enough that most of its moments are quantised, and some are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(130, 96), nn.Linear(96, 70), nn.LayerNorm(70), nn.Conv1d(70, 64, 3)).to(dtype)


def steps(net: nn.Module, optimizer: AdamMini, count: int, seed: int = 0) -> None:
    for k in range(count):
        for i, p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + 100 * k + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_engines_agree(dtype: torch.dtype, options: dict[str, Any]) -> None:
    results = []
    for engine in ({"fused": True}, {"fused": False}, {"foreach": True}):
        net = large(dtype)
        optimizer = AdamMini(net, lr=1e-2, weight_decay=0.1, **options, **engine)
        steps(net, optimizer, 5)
        results.append((net, optimizer))
    native, *others = results
    for other, _ in others:
        for p, q in zip(native[0].parameters(), other.parameters(), strict=True):
            # A code that falls on the other side of a rounding moves its element by a fraction of a step.
            far = (p - q).abs() > 1e-6 if dtype != torch.bfloat16 else p != q
            assert far.float().mean() < 0.01
            torch.testing.assert_close(p, q, rtol=0.01, atol=5e-3)


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_runs_repeat_resume_and_copy_to_the_bit(dtype: torch.dtype, options: dict[str, Any], fused: bool) -> None:
    net = large(dtype)
    optimizer = AdamMini(net, lr=1e-2, fused=fused, **options)
    steps(net, optimizer, 3)
    twin_net, twin = copy.deepcopy((net, optimizer))
    resumed_net = large(dtype)
    resumed_net.load_state_dict(net.state_dict())
    resumed = AdamMini(resumed_net, lr=1e-2, fused=fused, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for one in ((net, optimizer), (twin_net, twin), (resumed_net, resumed)):
        steps(*one, 3, seed=1)
    for p, q, r in zip(net.parameters(), twin_net.parameters(), resumed_net.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_a_compiled_step_and_one_parameter_at_a_time_round_alike() -> None:
    results = []
    for how in ("plain", "compiled", "single"):
        net = large(torch.bfloat16)
        optimizer = AdamMini(net, lr=1e-2, exp_avg_dtype="int8", bf16_rounding="stochastic")
        step = torch.compile(optimizer.step, backend="aot_eager") if how == "compiled" else optimizer.step
        for k in range(3):
            for i, p in enumerate(net.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i)).bfloat16()
            if how == "single":
                for g, group in enumerate(optimizer.param_groups):
                    for i in reversed(range(len(group["params"]))):
                        optimizer.step_parameter(g, i)
            else:
                step()
        results.append([p.detach() for p in net.parameters()])
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(None, 4.01), (torch.bfloat16, 2.01), ("int8", 1.10), ("int4", 0.62)]
)  # fmt: skip
def test_bytes_per_parameter_of_a_hundred_million_llama(dtype: Any, bound: float) -> None:
    with torch.device("meta"):
        model = Llama(vocab=16384, dim=768, layers=11, n_heads=12, n_kv_heads=12, hidden=2048)
    count = sum(p.numel() for p in model.parameters())
    assert 95e6 < count < 110e6
    assert sum(AdamMini(model, exp_avg_dtype=dtype).state_bytes().values()) / count <= bound


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_state_bytes_are_what_is_held(dtype: torch.dtype, options: dict[str, Any]) -> None:
    net = large(dtype)
    optimizer = AdamMini(net, **options)
    optimizer.init_state()
    held = {"exp_avg": 0, "exp_avg_sq": 0, "step": 0, "compensation": 0}
    for state in optimizer.state.values():
        for key, value in state.items():
            held["exp_avg" if key == "exp_avg_scale" else key] += value.numel() * value.element_size()
    assert optimizer.state_bytes() == {key: count for key, count in held.items() if count}


@pytest.mark.parametrize("moment", ["int8", "int4"])
def test_training_goes_where_it_goes_without(moment: str) -> None:
    losses = []
    for dtype in (None, moment):
        model = GPT(vocab=64, dim=64, layers=2, n_head=2)
        optimizer = AdamMini(model, lr=3e-3, exp_avg_dtype=dtype)
        for _ in range(30):
            loss = loss_of(model, batch(64, 0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    start = float(loss_of(GPT(vocab=64, dim=64, layers=2, n_head=2), batch(64, 0)))
    assert abs(losses[1] - losses[0]) < 0.1 * (start - losses[0])


def test_low_precision_parameters_do_not_stand_still() -> None:
    """A step of less than half a unit in the last place rounds to nothing; the other roundings keep it."""
    moved = {}
    for rounding in (None, "stochastic", "kahan"):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamMini([("lm_head.weight", p)], lr=1e-4, bf16_rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = float((1 - p.detach().double()).mean())
    assert moved[None] == 0
    assert abs(moved["stochastic"] - 0.01) < 1e-3 and abs(moved["kahan"] - 0.01) < 2e-3


@pytest.mark.parametrize(
    "options", [{"exp_avg_dtype": "int8", "bf16_rounding": "stochastic"}, {"exp_avg_dtype": "int4"}]
)  # fmt: skip
def test_steps_inside_the_backward_pass_and_on_the_host_round_alike(options: dict[str, Any]) -> None:
    """Roundings follow a parameter's place in its group, not the order or the place of steps."""
    results = []
    for how in ("plain", "released", "offloaded"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(96, 70), nn.GELU(), nn.Linear(70, 64)).bfloat16()
        make = CPUOffload if how == "offloaded" else AdamMini
        optimizer = make(net, lr=1e-2, **options)
        if how == "released":
            gradient_release(optimizer)
        for k in range(3):
            net(torch.randn(8, 96, generator=torch.Generator().manual_seed(k)).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))
