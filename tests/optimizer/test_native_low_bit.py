"""The native step with first moments in eight and four bits, and with bf16 parameters rounded at random or compensated.

The specification is optimizer/step/moments.py and optimizer/step/rounding.py in eager torch, tested by files of their
own. Sums of squares round differently in the two, so codes may differ by one, rarely.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer import Layout
from optimizer.step.engines import native
from optimizer.step.moments import INT4, INT8, Format, move, zero_state
from optimizer.step.update import block_mean_square

HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [  # a row's length against blocks of 128 and 64, runs against rows
    (Layout(0, [1] * 40), (40, 300)),
    (Layout(0, [8] * 4 + [1] * 8), (40, 128)),
    (Layout(0, [40]), (40, 131)),
    (Layout(0, [1500, 500]), (2000, 203)),  # runs that threads share
    (Layout(1, [1] * 200), (33, 200)),  # rows cross the axis
    (Layout(1, [50] * 3 + [1] * 41), (30, 191)),
    (Layout(1, [1] * 16, leading=(3,)), (3, 16, 96)),
    (Layout(2, [1] * 96, leading=(3,)), (3, 16, 96)),
    (Layout(0, [1] * 12), (12, 20, 3, 3)),  # a row is all of (20, 3, 3)
    (Layout(1, [2] * 10), (12, 20, 3, 3)),
    (Layout(1, [1] * 8, leading=(5,), fold=5), (40, 150)),
    (Layout.per_element((9, 130)), (9, 130)),
]


def native_step(p: Tensor, g: Tensor, state: dict[str, Tensor], layout: Layout, **options: Any) -> None:
    ready = native.prepare(p, g, state, layout, seed=options.pop("seed", 0), rounding=options.pop("rounding", None))
    assert ready is not None
    batches = native.Batches(1)
    batches.add(ready, p, g)
    batches.step(**{**HYPER, "maximize": False, **options})


def second_moment(g: Tensor, state: dict[str, Tensor], layout: Layout) -> Tensor:
    """Advance it, and give the factor of every element."""
    state["step"] += 1
    t, v = float(state["step"]), state["exp_avg_sq"]
    v.mul_(HYPER["beta2"]).add_(block_mean_square(g, layout), alpha=1 - HYPER["beta2"])
    root = v.sqrt() / math.sqrt(1 - HYPER["beta2"] ** t) + HYPER["eps"]
    factor = HYPER["lr"] / (1 - HYPER["beta1"] ** t) / root
    if layout.fold == 1:
        return factor.expand(g.shape)
    aligned = factor.unflatten(0, (layout.fold, -1))
    return aligned.expand(layout.fold, g.shape[0] // layout.fold, *g.shape[1:]).reshape(g.shape)


def eager_step(
    p: Tensor, g: Tensor, state: dict[str, Tensor], layout: Layout, *, seed: int = 0, rounding: str | None = None,
    maximize: bool = False,
) -> None:  # fmt: skip
    factor = second_moment(g, state, layout)
    move(
        p, g, state["exp_avg"], state.get("exp_avg_scale"), factor, beta1=HYPER["beta1"], maximize=maximize,
        decay=HYPER["lr"] * HYPER["weight_decay"], step=int(state["step"]), seed=seed, how=rounding,
        compensation=state.get("compensation"),
    )  # fmt: skip


def fresh(p: Tensor, layout: Layout, format: Format | None = None, moment: torch.dtype | None = None) -> Any:
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    first = zero_state(p, format) if format else {"exp_avg": torch.zeros_like(p, dtype=moment)}
    return {"step": torch.zeros(()), **first, "exp_avg_sq": torch.zeros(layout.aligned_shape(p.shape), dtype=wide)}


def codes_of(state: dict[str, Tensor]) -> Tensor:
    stored = state["exp_avg"]
    return stored if stored.dtype == torch.int8 else torch.stack([stored << 4, stored & 0xF0]).view(torch.int8) >> 4


@pytest.mark.parametrize("format", [INT8, INT4], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("layout", "shape"), SHAPES, ids=[str(shape) for _, shape in SHAPES])
def test_low_bit_moments_follow_the_specification(
    layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, format: Format
) -> None:
    if dtype not in (torch.float32, torch.float64) and shape[0] > 100:
        shape, layout = (40, 203), Layout(0, [30, 10])
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator).to(dtype)
    ours, theirs = (p.clone(), fresh(p, layout, format)), (p.clone(), fresh(p, layout, format))
    for k in range(4):
        g = (torch.randn(shape, generator=generator) * 10.0 ** (k - 3)).to(dtype)
        before = g.clone()
        native_step(ours[0], g, ours[1], layout, maximize=k == 1, seed=5)
        eager_step(theirs[0], g, theirs[1], layout, maximize=k == 1, seed=5)
        assert torch.equal(g, before)
        apart = (codes_of(ours[1]).int() - codes_of(theirs[1]).int()).abs()
        assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 1e-3
        torch.testing.assert_close(ours[1]["exp_avg_scale"], theirs[1]["exp_avg_scale"], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[1]["exp_avg_sq"], theirs[1]["exp_avg_sq"], rtol=1e-5, atol=0)
    exact = dtype in (torch.float32, torch.float64)
    # A code that differs moves the parameter by a part of a code's worth, once.
    torch.testing.assert_close(ours[0], theirs[0], **({"rtol": 1e-5, "atol": 2e-6} if exact else {}))


@pytest.mark.parametrize("format", [INT8, INT4], ids=lambda f: f.name)
def test_nothing_and_nonsense(format: Format) -> None:
    """A block of zeros has no scale; one with a NaN or an infinity stays NaN, its neighbours do not."""
    layout = Layout(1, [1] * 256, leading=(4,))
    p = torch.ones(4, 256)
    state = fresh(p, layout, format)
    g = torch.randn(4, 256)
    g[0], g[1, 3], g[2, 255], g[3, 130] = 0, float("nan"), float("inf"), -1e-40
    g[3, 64:129], g[3, 131:] = 0, 0
    native_step(p, g, state, layout)
    expected = fresh(p, layout, format)
    eager_step(torch.ones(4, 256), g, expected, layout)
    torch.testing.assert_close(state["exp_avg_scale"], expected["exp_avg_scale"], equal_nan=True)
    assert int((codes_of(state).int() - codes_of(expected).int()).abs().max()) <= 1
    assert bool(p[0].isfinite().all() and p[3].isfinite().all())
    native_step(p, torch.ones(4, 256), state, layout)
    assert p[1].isnan().nonzero().flatten().tolist() == list(range(format.block)), "the block, and it alone"


def test_what_low_bits_cannot_take() -> None:
    p = torch.zeros(64, 64)
    state = fresh(p, Layout(0, [64]), INT8)
    assert native.obstacle(p, p, state) is None
    assert "strides (1, 64)" in str(native.obstacle(p, torch.zeros(64, 64).t(), state))
    assert "have shapes" in str(native.obstacle(p, p, {**state, "exp_avg_scale": torch.zeros(64, 2)}))
    assert "int8" in str(native.obstacle(p, p, {k: t for k, t in state.items() if k != "exp_avg_scale"}))
    assert "not bfloat16" in str(native.obstacle(p, p, state, rounding="kahan"))
    assert "compensation" in str(native.obstacle(p.bfloat16(), p.bfloat16(), state, rounding="kahan"))


# --- bf16 parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize(
    ("kept", "strided"),
    [(kept, False) for kept in (torch.float32, torch.bfloat16, INT8, INT4)]
    + [(kept, True) for kept in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_bf16_parameters(rounding: str, kept: Any, strided: bool) -> None:
    """Bit for bit but for the last bit of what is rounded, and so one bf16 away, rarely; strides change nothing."""
    format, moment = (kept, None) if isinstance(kept, Format) else (None, kept)
    torch.manual_seed(0)
    layout, shape = Layout(0, [8, 8, 1, 1, 1, 1]), (20, 211)
    p = torch.randn(shape).bfloat16()
    ours, theirs = (p.clone(), fresh(p, layout, format, moment)), (p.clone(), fresh(p, layout, format, moment))
    if strided:
        mine = torch.empty_strided(shape, (1, 20), dtype=torch.bfloat16).copy_(p)
        ours = (mine, {**ours[1], "exp_avg": torch.zeros_like(mine, dtype=moment)})
    for p_, state in (ours, theirs):
        if rounding == "kahan":
            state["compensation"] = torch.zeros_like(p_)
    for _ in range(5):
        g = torch.randn(shape).bfloat16()
        native_step(ours[0], g, ours[1], layout, seed=2**32 - 5, rounding=rounding)
        eager_step(theirs[0], g, theirs[1], layout, seed=2**32 - 5, rounding=rounding)
    apart = (ours[0] != theirs[0]).float().mean()
    assert float(apart) < 5e-3
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-3)
    if rounding == "kahan":
        whole = [q.float() + s["compensation"].float() for q, s in (ours, theirs)]
        torch.testing.assert_close(*whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [None, INT8, INT4], ids=str)
def test_threads_do_not_matter(restored_threads: None, format: Format | None) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layout = Layout(0, [700] + [1] * 100)
        p = torch.randn(800, 300).bfloat16()
        state = fresh(p, layout, format)
        for _ in range(3):
            native_step(p, torch.randn(800, 300).bfloat16(), state, layout, seed=7, rounding="stochastic")
        results.append((p, state["exp_avg"], state["exp_avg_sq"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
