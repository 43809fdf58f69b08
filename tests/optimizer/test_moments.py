"""First moments in few bits, and bf16 parameters without a master copy: what is promised, number by number.

What these tests cannot see: whether training suffers (the study in experiments/studies/low_bit_moments measures that),
and whether an engine follows the specification (its own tests compare it with these functions).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optimizer.step import moments
from optimizer.step.moments import FORMATS, INT4, INT8, Format
from optimizer.step.rounding import apply, hashed, kahan, stochastic

formats = pytest.mark.parametrize("format", [INT8, INT4], ids=lambda f: f.name)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values(state: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """The moment that a state stands for, in the parameter's shape."""
    axes = moments.row_axes(shape)
    codes = state["exp_avg"].flatten(-axes) if state["exp_avg"].dtype == torch.int8 else state["exp_avg"]
    return moments.dequantise(codes, state["exp_avg_scale"], math.prod(shape[-axes:]), dtype).view(shape)


def move(p: Tensor, g: Tensor, state: dict[str, Tensor], factor: Tensor, **changed: object) -> None:
    options = {"beta1": 0.9, "decay": 0.0, "maximize": False, "step": 1, "seed": 7} | changed
    moments.move(p, g, state["exp_avg"], state["exp_avg_scale"], factor, **options)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([INT8, INT4]), st.integers(1, 5), st.integers(1, 300), st.floats(-60, 60), st.integers(0, 9999))
def test_every_value_becomes_a_neighbouring_code(format: Format, rows: int, n: int, exponent: float, seed: int) -> None:
    m = randn(rows, n, seed=seed) * 2.0**exponent
    codes, scale = moments.quantise(m, format, step=1 + seed, seed=seed)
    stored = moments.dequantise(codes, scale, n)
    assert stored.shape == m.shape and scale.dtype == format.scale_dtype
    unit = scale.float().repeat_interleave(format.block, -1)[:, :n]
    root = (m.abs() / unit).sqrt()
    slack = 1e-3  # of a code: 1 / scale, the root and the scale itself are rounded
    low, high = (root - slack).floor().clamp(min=0), (root + slack).floor() + 1
    assert (stored.abs() >= low**2 * unit * (1 - 1e-6)).all()
    assert (stored.abs() <= high.clamp(max=format.levels) ** 2 * unit * (1 + 1e-6)).all()
    assert (stored * m >= 0).all()
    largest = m.abs().amax(-1, keepdim=True)
    assert (stored.abs() <= largest * (1 + 2.0**-7)).all(), "a block grew by more than the rounding of its scale"


@formats
@pytest.mark.parametrize("over", ["blocks", "steps", "seeds"])
def test_right_on_average(format: Format, over: str) -> None:
    m, n = torch.cat([randn(1, 201), 1e-3 * randn(1, 201, seed=1)]), 500
    m[0, :5] *= 0.01
    if over == "blocks":
        stored = moments.quantise(m.repeat(n, 1), format, step=5, seed=5)
        drawn = moments.dequantise(*stored, 201).view(n, 2, 201).double()
    else:
        numbers = [(k, 5) if over == "steps" else (5, 1_000_003 * k) for k in range(1, n + 1)]
        stored_each = [moments.quantise(m, format, step=step, seed=seed) for step, seed in numbers]
        drawn = torch.stack([moments.dequantise(*stored, 201) for stored in stored_each]).double()
    low, high = drawn.amin(0), drawn.amax(0)
    varied = high > low
    assert varied.double().mean() > 0.9
    share, error = ((m - low) / (high - low))[varied].clamp(0, 1), ((drawn.mean(0) - m).abs() / (high - low))[varied]
    # 5.5 standard errors; a few draws more where one of the two neighbours is rare
    assert (error <= 5.5 * (share * (1 - share) / n).sqrt() + 3 / n).all()
    assert error.mean() < 0.02, "all a little off"  # expected: 0.8 x 0.4 / sqrt(500) = 0.014


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([INT8, INT4]), st.integers(2, 6), st.integers(1, 200), st.integers(0, 9999))
def test_rows_stand_alone(format: Format, rows: int, n: int, seed: int) -> None:
    m = randn(rows, n, seed=seed)
    codes, scale = moments.quantise(m, format, step=3, seed=seed)
    upper = moments.quantise(m[:1], format, step=3, seed=seed)
    lower = moments.quantise(m[1:], format, step=3, seed=seed, first=upper[1].numel())
    assert torch.equal(codes, torch.cat([upper[0], lower[0]]))
    assert torch.equal(scale, torch.cat([upper[1], lower[1]]))


def test_bytes_of_a_small_example() -> None:
    # The scale is 0.49 / 49 = 0.01, in bf16 a little more; in its units the values are squares of codes, nearly.
    m = torch.tensor([[0.5, -0.25, 0.04, 0.01, 0.0]]) * 0.98
    codes, scale = moments.quantise(m, INT4, step=2, seed=0)
    assert codes.tolist() == [[0x7 | 0xB << 4, 0x2 | 0x1 << 4, 0x0]]  # low nibble first; -5 is 0xB; the spare one is 0
    assert 0.01 <= scale.item() < 0.01 * (1 + 2.0**-7)
    codes, scale = moments.quantise(torch.tensor([[1.6129, -0.0004, 0.0]]), INT8, step=1, seed=0)
    assert codes.tolist() == [[127, -2, 0]]
    torch.testing.assert_close(scale, torch.tensor([[1e-4]]))


@formats
def test_nothing_stays_nothing_and_what_is_not_finite_stays_visible(format: Format) -> None:
    m = randn(5, 3 * format.block)
    m[0], m[1] = 0, 1e-31
    m[2, 5], m[3, format.block], m[4, -1] = math.nan, math.inf, -math.inf
    codes, scale = moments.quantise(m, format, step=1, seed=0)
    stored = moments.dequantise(codes, scale, m.shape[1])
    assert not codes[:2].any() and not scale[:2].any()
    blocks = stored.isnan().unflatten(-1, (3, -1))
    assert blocks.all(-1).tolist() == [[False] * 3] * 2 + [
        [True, False, False],
        [False, True, False],
        [False] * 2 + [True],
    ]
    assert blocks.any(-1).sum() == 3, "a block next to the bad one suffered"


@formats
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_is_there_for_good(format: Format, bad: float) -> None:
    p, state = torch.ones(64, 256), moments.zero_state(torch.empty(64, 256), format)
    g = torch.ones_like(p)
    g[3, 200] = bad
    move(p, g, state, torch.full((64, 1), 0.01))
    for _ in range(3):
        move(p, torch.ones_like(p), state, torch.full((64, 1), 0.01))
    assert p[3, 200].isnan() and values(state, (64, 256))[3, 200].isnan()
    assert p[:3].isfinite().all() and p[4:].isfinite().all()


SHAPES = [(3, 70), (4, 5, 64), (5, 40, 3, 3), (2, 3, 4, 5), (7, 129), (70, 16)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([INT8, INT4]), st.sampled_from(SHAPES), st.integers(0, 9999), st.floats(0, 0.999),
    st.sampled_from(["plain", "transposed", "expanded"]), st.booleans(),
)  # fmt: skip
def test_the_parameter_moves_by_the_exact_new_moment(
    format: Format, shape: tuple[int, ...], seed: int, beta1: float, strides: str, maximize: bool
) -> None:
    factor = randn(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64, seed=seed).abs()
    p = randn(*shape, dtype=torch.float64, seed=seed + 1)
    if strides == "transposed":
        p = p.transpose(0, -1).contiguous().transpose(0, -1)
    expected, state = p.clone(), moments.zero_state(p, format)
    for step in range(1, 4):
        g = randn(*shape, dtype=torch.float64, seed=seed + 1 + step)
        if strides == "expanded":
            g = g[:1].expand(shape)
        before, exact = g.clone(), beta1 * values(state, shape) + (1 - beta1) * (-g if maximize else g)
        move(p, g, state, factor, beta1=beta1, decay=0.01, maximize=maximize, step=step, seed=seed)
        assert torch.equal(g, before)
        expected = 0.99 * expected - factor * exact
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
        gap = exact.abs().max() * (2 * format.levels - 1) / format.levels**2  # between the largest codes
        assert (values(state, shape) - exact).abs().max() <= gap * 1.01


@formats
@pytest.mark.parametrize("keep", [True, False], ids=["random", "nearest"])
def test_moments_do_not_freeze(format: Format, keep: bool) -> None:
    """Gradients stop where a block's scale is held up by another element; rounded to nearest, moments stay for ever."""
    m = torch.zeros(4000, 32)
    m[:, 0], m[:, 1:] = 1.0, (3 / format.levels) ** 2
    for step in range(1, 31):
        m[:, 1:] *= 0.9
        if keep:
            m = moments.dequantise(*moments.quantise(m, format, step=step, seed=1), 32)
        else:
            roots = (m * format.levels**2 - 0.25).clamp(min=0).sqrt().round()
            m = roots.square() / format.levels**2
    left = m[:, 1:].mean().item() / (3 / format.levels) ** 2
    if keep:
        assert abs(left - 0.9**30) < 0.01  # standard error at most 0.002
    else:
        assert left == pytest.approx(1.0, rel=1e-4)


@formats
def test_a_path_is_that_of_exact_momentum_on_average(format: Format) -> None:
    """4,000 equal rows whose blocks draw numbers of their own; the mean path must be the exact one."""
    p = torch.zeros(4000, 40)
    state, exact, momentum = moments.zero_state(p, format), torch.zeros(40), torch.zeros(40)
    size = torch.logspace(-2, 0, 40)  # small and large gradients share blocks
    for step in range(1, 41):
        g = size * (0.3 + randn(40, seed=step))
        move(p, g.expand_as(p), state, torch.full((1, 1), 0.1), step=step, seed=9)
        momentum = 0.9 * momentum + 0.1 * g
        exact = exact - 0.1 * momentum
    error, spread = (p.mean(0) - exact).abs(), p.std(0)
    assert (error <= 5 * spread / 4000**0.5 + 1e-6).all()
    assert (spread > 0).all()


@formats
def test_large_tensors_in_pieces_are_the_same_and_leave_small_temporaries(
    format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, out.untyped_storage().nbytes() // 4)
            return out

    for shape in ((6, 100, 700), (3, 200_000), (2, 300_000)):
        p, g, factor = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2).abs()
        state, whole = moments.zero_state(p, format), moments.zero_state(p, format)
        expected = p.clone()
        with monkeypatch.context() as patch:
            patch.setattr(moments, "_CHUNK", 1 << 30)
            move(expected, g, whole, factor)
        with Largest() as seen:
            move(p, g, state, factor)
        assert torch.equal(p, expected) and all(torch.equal(state[name], whole[name]) for name in state)
        assert seen.numel <= 1.5 * 2**15  # blocks at the ends of rows are filled up


def test_what_is_quantised_and_what_it_costs() -> None:
    assert [moments.quantises(s) for s in ((64, 64), (63, 64), (4096,), (10_000, 8), (64, 8, 3, 3), ())] == [
        True, False, False, False, True, False,
    ]  # fmt: skip
    assert moments.state_shapes((64, 32, 3, 3), INT4) == ((64, 144), (64, 9))
    assert moments.state_shapes((8, 100, 300), INT8) == ((8, 100, 300), (8, 100, 3))
    for shape in ((4096, 4096), (50_257, 768), (512, 512, 3, 3)):
        assert moments.state_bytes(shape, INT8) / math.prod(shape) < 1.04
        assert moments.state_bytes(shape, INT4) / math.prod(shape) < 0.57
        for format in FORMATS.values():
            on_meta = moments.zero_state(torch.empty(shape, device="meta"), format)
            assert sum(t.numel() * t.itemsize for t in on_meta.values()) == moments.state_bytes(shape, format)


def test_moments_in_floating_point_take_the_same_way() -> None:
    p, exact_p = randn(70, 1000).bfloat16(), randn(70, 1000).bfloat16().float()
    m, exact, factor = torch.zeros(70, 1000), torch.zeros(70, 1000), torch.rand(70, 1)
    for step in range(1, 4):
        g = randn(70, 1000, seed=step).bfloat16()
        moments.move(p, g, m, None, factor, beta1=0.9, decay=0.1, maximize=False, step=step, seed=0)
        exact = 0.9 * exact + 0.1 * g.float()
        exact_p = (0.9 * exact_p - factor * exact).bfloat16().float()
    torch.testing.assert_close(m, exact)
    torch.testing.assert_close(p.float(), exact_p, rtol=2.0**-7, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 2**24), st.integers(0, 2**32 - 1))
def test_random_numbers_are_those_of_the_formula(index: int, step: int, seed: int) -> None:
    x = (index * 0x9E3779B9 + step * 0x85EBCA6B + seed) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    assert hashed(torch.tensor([index]), step, seed).item() == x
    assert hashed(torch.tensor([index]), torch.tensor(step), seed).item() == x


def test_random_numbers_are_uniform_over_elements_and_over_steps() -> None:
    elements = hashed(torch.arange(2**16), step=3, seed=7)
    steps = torch.stack([hashed(torch.arange(4), step, seed=7) for step in range(1, 2**12)])[:, 2]
    for drawn in (elements, steps):
        counts = torch.bincount(drawn >> 28, minlength=16).double()
        expected = len(drawn) / 16
        assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 15 degrees of freedom: p = 8e-5


def test_stochastic_rounding_is_right_on_average() -> None:
    exact = torch.cat([randn(200), -randn(200).abs() * 1e-3, torch.tensor([1.0, -2.5, 0.0, 1e-40, -1e30])])
    drawn = torch.stack([stochastic(exact, step=step, seed=5).double() for step in range(1, 4001)])
    gap = (2.0 ** (exact.double().abs().clamp(min=1e-45).log2().floor() - 7)).clamp(min=2.0**-133)
    assert ((drawn - exact).abs() <= gap).all(), "not a neighbour"
    share = ((exact.double() - drawn.amin(0)) / gap).clamp(0, 1)
    error = (drawn.mean(0) - exact).abs() / gap
    assert (error <= 5.5 * ((share * (1 - share)) / 4000).sqrt() + 1e-3).all()
    kept = exact.bfloat16().float() == exact
    assert (drawn[:, kept] == exact[kept]).all(), "a number bf16 has was changed"
    assert (drawn.std(0)[~kept] > 0).any()


def test_stochastic_rounding_does_not_depend_on_pieces_and_leaves_the_infinite_alone() -> None:
    exact = randn(40, 30)
    whole = stochastic(exact, step=9, seed=1)
    pieces = [stochastic(exact[i : i + 7], step=9, seed=1, first=i * 30) for i in range(0, 40, 7)]
    assert torch.equal(whole, torch.cat(pieces))
    assert not torch.equal(whole, stochastic(exact, step=10, seed=1))
    odd = stochastic(torch.tensor([math.nan, math.inf, -math.inf]), step=1, seed=0)
    assert odd[0].isnan() and odd[1] == math.inf and odd[2] == -math.inf


@pytest.mark.parametrize("how", ["kahan", "stochastic"])
def test_small_steps_are_not_lost(how: str) -> None:
    """1,000 steps of 1e-4 of the weight each: too small for bf16 alone, which does not move at all."""
    start = (randn(500).abs() + 0.5).bfloat16()
    master, p, plain, compensation = start.float(), start.clone(), start.clone(), torch.zeros_like(start)
    for step in range(1, 1001):
        change = 1e-4 * (1 + 0.5 * randn(500, seed=step))
        master = master * (1 - 1e-5) - change
        apply(plain, change, decay=1e-5)
        apply(p, change, decay=1e-5, how=how, compensation=compensation, step=step, seed=3)
    travelled = (start.float() - master).abs().mean()
    assert (plain.float() - master).abs().mean() / travelled > 0.9
    if how == "kahan":
        assert (p.float() + compensation.float() - master).abs().mean() / travelled < 2e-3
        assert ((p.float() - master).abs() <= 2.0**-7 * master.abs()).all(), "more than one step of bf16 away"
    else:  # each weight walks at random around the master's path, by 0.19 of its length; all together do not
        assert (p.float() - master).mean().abs() / travelled < 0.05
        assert (p.float() - master).abs().mean() / travelled < 0.3


def test_kahan_keeps_what_rounding_takes() -> None:
    p, delta = randn(1000).bfloat16(), 1e-3 * randn(1000, seed=1)
    new, left = kahan(p, torch.zeros_like(p), delta)
    # Left over: the rounding of the compensation itself, 2^-9 of at most half a step of the parameter.
    assert ((new.double() + left.double() - p.double() - delta).abs() <= 2.0**-17 * new.double().abs() + 1e-7).all()


@pytest.mark.parametrize(
    ("how", "dtype", "message"),
    [
        ("floor", torch.bfloat16, "'floor'"),
        ("kahan", torch.float32, "torch.float32"),
        ("kahan", torch.bfloat16, "zeros"),
    ],
)
def test_what_cannot_be_rounded_is_refused(how: str, dtype: torch.dtype, message: str) -> None:
    p = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        apply(p, torch.ones(3), decay=0.0, how=how)
    assert torch.equal(p, torch.ones(3, dtype=dtype))


@formats
@pytest.mark.parametrize("how", [None, "stochastic", "kahan"])
def test_bf16_parameters_follow_fp32_ones(format: Format, how: str | None) -> None:
    p = randn(32, 200).bfloat16()
    master, compensation = p.float(), torch.zeros_like(p)
    state, other = moments.zero_state(p, format), moments.zero_state(master, format)
    for step in range(1, 31):
        g = randn(32, 200, seed=step).bfloat16()
        move(p, g, state, torch.full((32, 1), 1e-2), decay=1e-3, how=how, compensation=compensation, step=step, seed=11)
        move(master, g.float(), other, torch.full((32, 1), 1e-2), decay=1e-3, step=step, seed=11)
    assert all(torch.equal(state[name], other[name]) for name in state), "moments depend on how parameters are kept"
    error = (p.float() - master).norm() / (master - randn(32, 200).bfloat16().float()).norm()
    assert error < {None: 0.6, "stochastic": 0.3, "kahan": 0.06}[how]
