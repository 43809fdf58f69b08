"""The native step of factored second moments against the reference and the eager step, for every layout in memory.

What these tests cannot see: whether the eager step is right (test_factored.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer import AdamMini
from optimizer.partition import FactoredLayout
from optimizer.step.engines import native
from optimizer.step.engines.rounded import rounded_update
from optimizer.step.factored import factored_update
from optimizer.step.hyper import Hyper
from optimizer.step.moments import INT4, INT8, Format, zero_state
from tests.optimizer.factored_steps import Reference, state_of
from tests.optimizer.strategies import factored_layouts

HYPER: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "maximize": False
}  # fmt: skip
LARGE = [  # several tiles, pieces that cross tiles, and matrices that threads share
    (FactoredLayout((700, 900), 0), (700, 900)),
    (FactoredLayout((900, 700), 1), (900, 700)),  # as GPT-2's Conv1D: rows run down the memory
    (FactoredLayout((30, 9000), 0), (30, 9000)),
    (FactoredLayout((600, 1200), 0, [(0, 300), (1, 200), (2, 100)]), (600, 1200)),
    (FactoredLayout((200, 4800), 1, [(0, 1600), (1, 1600), (2, 1600)]), (200, 4800)),
    (FactoredLayout((3300, 80), 1, [(0, 1), (1, 1)], repeat=40), (3300, 80)),  # interleaved rows
    (FactoredLayout((60, 5000), 1, [(0, 300), (1, 400), (0, 7), (2, 293)], repeat=5), (60, 5000)),
    (FactoredLayout((300, 40), 0, [(0, 2), (1, 3), (2, 1)], repeat=50), (300, 40)),
    (FactoredLayout((3, 300, 400), 1, leading=1), (3, 300, 400)),  # experts, each on one thread
    (FactoredLayout((2, 300, 900), 2, [(0, 450), (1, 450)], leading=1), (2, 300, 900)),  # and shared
    (FactoredLayout((20, 30, 3, 3), 1), (20, 30, 3, 3)),  # transposed convolution
    (FactoredLayout((320, 60), 1, leading=1, fold=4), (320, 60)),
]


def name_of(x: Any) -> str:
    return str(x) if isinstance(x, tuple) else f"axis {x.axis}, {x.parts} parts"


def take(p: Tensor, g: Tensor, state: dict[str, Tensor], layout: FactoredLayout, **options: Any) -> None:
    kinds = {name: options.pop(name) for name in ("seed", "rounding") if name in options}
    ready = native.prepare(p, g, state, layout, **kinds)
    assert ready is not None, native.obstacle(p, g, state, layout=layout)
    batches = native.Batches(1)
    batches.add(ready, p, g)
    batches.step(**{**HYPER, **options})


def eager(p: Tensor, g: Tensor, state: dict[str, Tensor], layout: FactoredLayout, **options: Any) -> None:
    state["step"] += 1
    means = (state["exp_avg_sq"], state["exp_avg_sq_col"])
    factored_update(p, g, state["exp_avg"], *means, layout, step=state["step"].item(), **{**HYPER, **options})


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    for name in ("exp_avg_sq", "exp_avg_sq_col"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=0, equal_nan=True, msg=name)


def permuted(x: Tensor, order: list[int]) -> Tensor:
    """The same values, dense, with the axes in another order in memory."""
    axes = sorted(range(x.dim()), key=lambda d: order[d])
    return x.permute(axes).contiguous().permute([axes.index(d) for d in range(x.dim())])


@settings(max_examples=100, deadline=None)
@given(
    factored_layouts(), st.integers(0, 10_000), st.permutations(range(5)), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_equals_the_reference_in_float64(
    pair: Any, seed: int, order: list[int], reordered: bool, maximize: bool, decay: float
) -> None:
    """Tensors in row-major order, and in any order of axes that all of them have: right, or left to the eager step."""
    layout, shape = pair
    options = {**HYPER, "maximize": maximize, "weight_decay": decay}
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference, p = Reference(start, layout), permuted(start, order) if reordered else start.clone()
    state = state_of(p, layout)
    for _ in range(3):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        g = permuted(values, order) if reordered else values.clone()
        ready = native.prepare(p, g, state, layout)
        if ready is None:
            assert not p.is_contiguous() and layout.leading, "only leading axes must come first in memory"
            assert "not dense in one order" in str(native.obstacle(p, g, state, layout=layout))
            return
        take(p, g, state, layout, **options)
        assert torch.equal(g, values), "the gradient was touched"
        torch.testing.assert_close(p, reference.step(values, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("layout", "shape"), LARGE, ids=name_of)
def test_large_layouts(restored_threads: None, layout: FactoredLayout, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, ours, theirs = p.clone(), state_of(p, layout), state_of(p, layout)
    for _ in range(2):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        take(p, g, ours, layout)
        eager(q, g, theirs, layout)
    close(ours, theirs, 1e-12)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert float(ours["step"]) == 2


@pytest.mark.parametrize("layout_and_shape", [LARGE[i] for i in (0, 4, 5, 9)], ids=lambda x: str(x[1]))
def test_threads_do_not_matter(restored_threads: None, layout_and_shape: Any) -> None:
    layout, shape = layout_and_shape
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p = torch.randn(shape)
        state = state_of(p, layout)
        for _ in range(2):
            take(p, torch.randn(shape), state, layout)
        results.append((p, *state.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("layout", "shape"), [LARGE[i] for i in (1, 2, 3, 6)], ids=name_of)
@pytest.mark.parametrize(
    ("dtype", "moment"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_low_precision(layout: FactoredLayout, shape: tuple[int, ...], dtype: Any, moment: Any) -> None:
    """Means as in float64, huge fp16 gradients included; parameters as close to exact ones as the eager step's."""
    torch.manual_seed(0)
    start = torch.randn(shape).to(dtype)
    tensors = [start.clone(), start.clone(), start.double()]
    ours, theirs, exact = (state_of(p, layout, m) for p, m in zip(tensors, (moment, moment, None), strict=True))
    for step in range(2):
        g = (6e4 * torch.rand(shape) if step == 1 else 1e-4 * torch.randn(shape)).to(dtype)
        take(tensors[0], g, ours, layout)
        eager(tensors[1], g, theirs, layout)
        eager(tensors[2], g.double(), exact, layout)
    close({k: v.double() for k, v in ours.items()}, exact, 1e-5)
    mine, other = (float((p.double() - tensors[2]).abs().mean()) for p in tensors[:2])
    assert mine <= 1.1 * other


def test_scaled_gradients_and_moments_in_bf16() -> None:
    """A GradScaler's factor is divided out, in both means and in the first moment."""
    layout, shape = LARGE[3]
    torch.manual_seed(0)
    p = torch.randn(shape)
    q, ours, theirs = p.clone(), state_of(p, layout), state_of(p, layout)
    for k in range(2):
        g = torch.randn(shape)
        take(p, 1024 * g, ours, layout, grad_scale=1024.0, maximize=k == 1)
        eager(q, g, theirs, layout, maximize=k == 1)
    close(ours, theirs, 1e-5)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conv1d", [False, True])
def test_zeros_and_infinities(conv1d: bool) -> None:
    """Zero rows and columns rest; one infinite gradient stops its part and no other; nothing overflows."""
    shape = (6, 8)
    layout = FactoredLayout((8, 6), 1, [(0, 3), (1, 3)]) if conv1d else FactoredLayout(shape, 0, [(0, 3), (1, 3)])
    turn = (lambda x: x.t().contiguous()) if conv1d else (lambda x: x)
    g = torch.randn(shape)
    g[1], g[:, 2] = 0, 0
    p = turn(torch.ones(shape))
    take(p, turn(g), state_of(p, layout), layout, weight_decay=0.0)
    moved = turn(g) != 0
    assert torch.equal(p != 1, moved)

    g[5, 0], g[4] = torch.inf, 0
    p = turn(torch.ones(shape))
    state = state_of(p, layout)
    take(p, turn(g), state, layout, weight_decay=0.0)
    back = p.t() if conv1d else p
    assert torch.equal(back[:3] != 1, g[:3] != 0), "the other part steps as ever"
    assert back[5, 0].isnan() and bool((back[3:, 1:] == 1).all() and (back[3:5] == 1).all())
    q = turn(torch.ones(shape))
    expected = state_of(q, layout)
    eager(q, turn(g), expected, layout, weight_decay=0.0)
    torch.testing.assert_close(p, q, equal_nan=True)
    close(state, expected, 1e-6)

    p = turn(torch.zeros(shape))
    take(p, torch.full_like(p, 1e18), state_of(p, layout), layout, lr=0.1)
    torch.testing.assert_close(p, torch.full_like(p, -0.1))
    p = turn(torch.ones(shape))
    take(p, torch.zeros_like(p), state_of(p, layout), layout, weight_decay=0.0)
    assert bool((p == 1).all())


def test_gradients_in_another_order_are_copied_and_parameters_with_gaps_are_refused() -> None:
    """Gradients in another order of memory than the parameter, expanded and gapped ones; the same for parameters."""
    layout = FactoredLayout((6, 8), 0)
    p, g = torch.randn(6, 8), torch.randn(6, 8)
    state = state_of(p, layout)
    for odd in (g.t().contiguous().t(), g[:1].expand(6, 8), torch.stack([g, g], -1)[..., 0]):
        assert native.prepare(p, odd, state, layout) is None
        assert native.obstacle(p, odd, state, layout=layout) is None
        assert native.prepare(p, native.dense_gradient(p, odd), state, layout) is not None
        made = []
        for fused in (None, True, False):
            w = nn.Parameter(p.clone())
            optimizer = AdamMini([("w", w)], lr=0.1, rules="factored", fused=fused)
            for gradient in (g, odd, g):
                before = gradient.clone()
                w.grad = gradient
                optimizer.step()
                assert torch.equal(gradient, before)
            made.append(w.detach())
        torch.testing.assert_close(made[0], made[2])
        assert torch.equal(made[0], made[1])
    gapped = torch.stack([p, p], -1)[..., 0]
    assert "not dense in one order of axes (strides (16, 2), " in str(native.obstacle(gapped, g, {}, layout=layout))
    w = nn.Parameter(gapped)
    w.grad = g
    with pytest.raises(RuntimeError, match=r"fused=True.*second moment is factored.*fused=None"):
        AdamMini([("w", w)], rules="factored", fused=True).step()
    assert torch.equal(w.detach(), p)
    for name, wrong in (
        ("exp_avg_sq", torch.zeros(6)), ("exp_avg_sq_col", torch.zeros(8)),
        ("exp_avg_sq_col", torch.zeros(1, 8).double()), ("exp_avg_sq_col", torch.zeros(1, 16)[:, ::2]),
        ("exp_avg_sq_col", None),
    ):  # fmt: skip
        assert name in str(native.obstacle(p, g, {**state, name: wrong}, layout=layout))
        assert native.prepare(p, g, {**state, name: wrong}, layout) is None


def test_an_empty_tensor_counts_its_step() -> None:
    layout, p = FactoredLayout((0, 5), 0), torch.zeros(0, 5)
    state = state_of(p, layout)
    take(p, torch.zeros(0, 5), state, layout)
    assert float(state["step"]) == 1


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_optimizer_repeats_its_call_and_follows_the_eager_one(conv1d: bool, dtype: torch.dtype) -> None:
    """Also transposed and channels-last weights, whose column means are not in the order of memory."""
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        values = {
            "mlp.weight": torch.randn(70, 90),
            "conv.weight": torch.randn(8, 6, 3, 3),
            "norm.weight": torch.ones(9),
        }
        if conv1d:
            values["mlp.weight"] = values["mlp.weight"].t().contiguous().t()
            values["conv.weight"] = values["conv.weight"].to(memory_format=torch.channels_last)
        parameters = {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}
        optimizer = AdamMini(parameters.items(), lr=1e-2, rules="factored", fused=fused)
        for k in range(4):
            for p in parameters.values():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            optimizer.step()
            if k == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        made.append([*parameters.values(), *(optimizer.state[parameters["conv.weight"]][k] for k in
                     ("exp_avg_sq", "exp_avg_sq_col"))])  # fmt: skip
    exact = dtype == torch.float64
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-6)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, INT8, INT4], ids=str)
@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
@pytest.mark.parametrize(("layout", "shape"), [LARGE[i] for i in (7, 8, 10, 11)], ids=name_of)
def test_roundings_and_quantised_moments(
    layout: FactoredLayout, shape: tuple[int, ...], rounding: str | None, kept: torch.dtype | Format
) -> None:
    """As ``rounded_update``, but for the last bit of what is rounded, rarely."""
    torch.manual_seed(0)
    start, format = torch.randn(shape).bfloat16(), kept if isinstance(kept, Format) else None
    made = []
    for _ in range(2):
        p = start.clone()
        state = state_of(p, layout, None if format else kept)  # type: ignore[arg-type]
        if format:
            state |= zero_state(p, format)
        if rounding == "kahan":
            state["compensation"] = torch.zeros_like(p)
        made.append((p, state))
    (p, ours), (q, theirs) = made
    options = {k: v for k, v in HYPER.items() if k != "maximize"}
    for k in range(3):
        g = (torch.randn(shape) * 10.0 ** (k - 2)).bfloat16()
        take(p, g, ours, layout, rounding=rounding, seed=7, maximize=k == 1)
        theirs["step"] += 1
        rounded_update(q, g, theirs, layout, Hyper(**options, maximize=k == 1), seed=7, rounding=rounding)
    close(ours, theirs, 1e-5)
    assert float((p != q).float().mean()) < 5e-3
    torch.testing.assert_close(p, q, rtol=2**-7, atol=2e-3)
    if format:
        torch.testing.assert_close(ours["exp_avg_scale"], theirs["exp_avg_scale"], rtol=2**-7, atol=0)
    if format is INT8:
        assert int((ours["exp_avg"].int() - theirs["exp_avg"].int()).abs().max()) <= 1
