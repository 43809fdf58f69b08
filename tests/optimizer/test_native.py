"""The native step against the paper's transcription and the eager step; and what happens where it cannot be built."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer import AdamMini, Layout
from optimizer.step.engines import native
from optimizer.step.engines.native import library
from optimizer.step.reference import initial_state, reference_step
from optimizer.step.update import adam_mini_update
from tests import forking
from tests.optimizer.models import Llama
from tests.optimizer.strategies import layouts
from tests.optimizer.zoo import TEXT

COMMON: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def take(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, layout: Layout, *, maximize: bool = False) -> None:
    ready = native.prepare(p, g, {"exp_avg": m, "exp_avg_sq": v, "step": t}, layout)
    assert ready is not None
    batches = native.Batches(1)
    batches.add(ready, p, g)
    batches.step(lr=1e-2, maximize=maximize, **COMMON)


def compare(layout: Layout, shape: tuple[int, ...], seed: int, steps: int, maximize: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, ids = p.clone(), layout.block_ids(shape)
    state = initial_state(p, ids)
    m, v, t = torch.zeros_like(p), torch.zeros(layout.aligned_shape(shape), dtype=torch.float64), torch.zeros(())
    for _ in range(steps):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = g.clone()
        take(p, g, m, v, t, layout, maximize=maximize)
        expected = reference_step(expected, g, state, ids, lr=1e-2, maximize=maximize, **COMMON)
        assert torch.equal(g, before), "the gradient was touched"
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
    assert float(t) == steps


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(0, 10_000), st.booleans())
def test_equals_the_reference_in_float64(pair: Any, seed: int, maximize: bool) -> None:
    compare(*pair, seed, 3, maximize)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(0, [1] * 70), (70, 900)),  # rows
        (Layout(0, [64, 64, 1, 1]), (130, 300)),  # heads, then rows
        (Layout(0, [300]), (300, 400)),  # one block over all threads
        (Layout(1, [1] * 300), (200, 300)),  # columns, in strips
        (Layout(1, [100] * 3 + [1] * 60), (90, 360)),  # columns in runs
        (Layout(2, [1] * 60, leading=(3,)), (3, 40, 60)),  # transposed experts
        (Layout(1, [1] * 40, leading=(3,)), (3, 40, 60)),  # experts
        (Layout(1, [1] * 8), (20, 8, 3, 3)),  # transposed convolution
        (Layout.per_element((7, 60)), (7, 60)),
        (Layout.per_element(()), ()),
    ],
)
def test_large_layouts(restored_threads: None, layout: Layout, shape: tuple[int, ...], threads: int) -> None:
    """Few steps on two threads: where the cores are busy, every step waits for the slower thread."""
    torch.set_num_threads(threads)
    compare(layout, shape, 0, 10 if threads == 1 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", [None, torch.float32])
def test_low_precision(dtype: torch.dtype, moment: torch.dtype | None) -> None:
    """v as in the eager step, huge fp16 gradients included; parameters no further from exact ones than there."""
    torch.manual_seed(0)
    layout, shape = Layout(0, [4, 4, 1, 1, 1]), (11, 33)
    p = torch.randn(shape).to(dtype)
    m = torch.zeros(shape, dtype=moment or dtype)
    pairs = [(p.clone(), m.clone(), torch.zeros(11, 1)) for _ in range(2)]
    exact, ids = p.double(), layout.block_ids(shape)
    state = initial_state(exact, ids)
    t = torch.zeros(())
    for step in range(1, 6):
        g = (6e4 * torch.rand(shape) if step == 3 else 1e-4 * torch.randn(shape)).to(dtype)
        take(pairs[0][0], g, pairs[0][1], pairs[0][2], t, layout)
        adam_mini_update(pairs[1][0], g, pairs[1][1], pairs[1][2], layout, step=step, lr=1e-2, maximize=False, **COMMON)
        exact = reference_step(exact, g.double(), state, ids, lr=1e-2, **COMMON)
    assert bool(torch.isfinite(pairs[0][2]).all())
    torch.testing.assert_close(pairs[0][2], pairs[1][2], rtol=1e-5, atol=0)
    ours, eager = (float((pair[0].double() - exact).abs().mean()) for pair in pairs)
    assert ours <= 1.1 * eager


@pytest.mark.parametrize("make", [Llama, *(TEXT[n] for n in ("gpt2", "mixtral", "dbrx", "gpt_oss", "qwen3_next"))])
@pytest.mark.parametrize("rules", ["adam_mini", "slim_adam", "pytorch_default", "elementwise"])
def test_whole_models_follow_the_eager_step(make: Any, rules: str) -> None:
    models = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = make().double()
        optimizer = AdamMini(model, lr=1e-2, weight_decay=0.1, rules=rules, fused=fused)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_it_cannot_take_goes_the_eager_way() -> None:
    """Gradients in a dtype of their own, beside what it takes, in one optimizer; fused=True says what is in the way."""
    made = []
    for fused in (None, False):
        torch.manual_seed(0)
        wide, plain = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))
        wide.grad_dtype = torch.bfloat16
        optimizer = AdamMini([("a.weight", wide), ("b.weight", plain)], lr=0.1, fused=fused)
        for _ in range(3):
            wide.grad, plain.grad = torch.ones(6, 4, dtype=torch.bfloat16), torch.ones(4, 6)
            optimizer.step()
        made.append((wide, plain))
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q)
    strict = AdamMini([("a.weight", made[0][0])], lr=0.1, fused=True)
    before = made[0][0].detach().clone()
    with pytest.raises(RuntimeError, match=r"fused=True.*a\.weight.*torch\.float32 and torch\.bfloat16.*fused=None"):
        strict.step()
    assert torch.equal(made[0][0], before)


def test_expanded_gradients_are_read_right() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = AdamMini([("w.weight", p)], lr=0.1, betas=(0.9, 0.95), eps=0.0)
    p.grad = torch.tensor(2.0).expand(4, 3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.9))


def test_steps_are_deterministic_and_threads_do_not_matter(restored_threads: None) -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p, m, v, t = torch.randn(300, 400), torch.zeros(300, 400), torch.zeros(300, 1), torch.zeros(())
        for _ in range(3):
            take(p, torch.randn(300, 400), m, v, t, Layout(0, [150, 150]))
        results.append(p)
    assert torch.equal(results[1], results[2]) and torch.equal(results[0], results[1])


# --- building it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cache of one's own, nothing loaded yet."""
    monkeypatch.setenv("ADAM_MINI_CACHE", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield tmp_path / "cache"
    library.library.cache_clear()


def only(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(library, "_folders", lambda: iter([str(folder) for folder in folders]))


def test_without_a_compiler_steps_are_eager(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = AdamMini([("w.weight", p)], lr=0.1)
    with caplog.at_level(logging.INFO, logger="optimizer"):
        for _ in range(3):
            p.grad = torch.ones(3, 2)
            optimizer.step()
    said = [r for r in caplog.records if "native" in r.getMessage()]
    assert [r.levelname for r in said] == ["WARNING"] and "no C++ compiler" in said[0].getMessage()
    with pytest.raises(RuntimeError, match="cannot be built here"):
        AdamMini([("w.weight", p)], fused=True).step()


def test_all_that_a_compiler_said_is_kept(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only(monkeypatch, fresh)
    script = fresh.parent / "talkative-c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: first" >&2\necho "then that" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(library.tempfile, "tempdir", str(fresh.parent))
    with caplog.at_level(logging.WARNING, logger="optimizer"):
        assert not native.available()
    (kept,) = fresh.parent.glob("adam_mini_lab-build-*.log")
    assert kept.read_text().splitlines() == ["error: first", "then that"]
    assert str(kept) in caplog.text and "error: first" in caplog.text


def test_a_compiler_that_fails_is_quoted_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only(monkeypatch, fresh)
    script = fresh.parent / "broken-c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: out of memory" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with caplog.at_level(logging.WARNING, logger="optimizer"):
        assert not native.available() and not native.available()
    assert len(caplog.records) == 1 and "error: out of memory" in caplog.text
    assert [f.suffix for f in fresh.iterdir()] == [".lock"], "no half-written file stays behind"


STAND_IN = """
extern "C" long adam_mini_abi() { return ABI; }
extern "C" void adam_mini_step() {}
"""
"""What the cache is tested with, because the step itself takes seconds to compile."""


def use_stand_in(folder: Path) -> None:
    """Let ``library`` compile the stand-in."""
    source = folder / "kernel.cpp"
    source.write_text(STAND_IN.replace("ABI", str(library._ABI)))
    library._SOURCE, library._HEADERS = source, ()


def ask(folder: Path, processes: int = 1, compiler: str = "") -> list[tuple[int, str]]:
    """Exit status and log of processes that start together and have no native library loaded; 0 is "available"."""
    with tempfile.TemporaryDirectory() as logs:
        outputs = [Path(logs, str(number)) for number in range(processes)]
        started = [forking.start(build, folder, compiler, output=output) for output in outputs]
        return [(process.wait(240), output.read_text()) for process, output in zip(started, outputs, strict=True)]


def build(folder: Path, compiler: str) -> None:
    logging.basicConfig(level=logging.INFO)
    if compiler:
        os.environ["CXX"] = compiler
    library._folders = lambda: iter([str(folder)])
    with tempfile.TemporaryDirectory() as sources:
        use_stand_in(Path(sources))
        raise SystemExit(not (library.available() and library.available()))


def built(folder: Path) -> list[Path]:
    return list(folder.glob("*.so"))


def test_a_torn_file_in_the_cache_is_built_again(tmp_path: Path) -> None:
    assert ask(tmp_path) == [(0, "")]
    (file,) = built(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    ((code, said),) = ask(tmp_path)
    assert code == 0 and said.count("is damaged") == 1
    assert [f.stat().st_size > 5000 for f in built(tmp_path)] == [True]


def test_a_cache_that_cannot_be_written_is_passed_over(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = fresh.parent / "a file"
    blocked.write_text("")
    only(monkeypatch, blocked / "cache", fresh)
    monkeypatch.setattr(library, "_SOURCE", library._SOURCE)
    monkeypatch.setattr(library, "_HEADERS", library._HEADERS)
    use_stand_in(fresh.parent)
    assert native.available() and len(built(fresh)) == 1


def test_a_cache_that_can_only_be_read_is_used(tmp_path: Path) -> None:
    """What somebody else built: nothing has to be written, not even a lock."""
    assert ask(tmp_path) == [(0, "")]
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # cannot be opened, whoever asks
    before = {f: f.stat().st_mtime_ns for f in built(tmp_path)}
    assert ask(tmp_path) == [(0, "")]
    assert {f: f.stat().st_mtime_ns for f in built(tmp_path)} == before


def test_eight_processes_that_start_at_once(tmp_path: Path) -> None:
    """One builds, and nobody has anything to say."""
    assert ask(tmp_path, 8) == [(0, "")] * 8
    assert len(built(tmp_path)) == 1


def test_a_compiler_that_dies_half_way_leaves_nothing(tmp_path: Path) -> None:
    """Eight at once: each says so once and steps eagerly."""
    script = tmp_path / "dying-c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
        'while [ "$1" != -o ]; do shift; done\necho half > "$2"\nkill -9 $$\n'
    )
    script.chmod(0o755)
    cache = tmp_path / "cache"
    answers = ask(cache, 8, compiler=str(script))
    assert all(code == 1 and said.count("cannot be built") == 1 for code, said in answers)
    assert [f.suffix for f in cache.iterdir()] == [".lock"]


# --- what changes between steps ---------------------------------------------------------------------------------------


def pair(shape: tuple[int, ...] = (6, 5)) -> list[tuple[nn.Parameter, AdamMini]]:
    out = []
    for fused in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape))
        out.append((p, AdamMini([("lm_head.weight", p)], lr=0.1, fused=None if fused else False)))
    return out


def step_both(both: list[tuple[nn.Parameter, AdamMini]], seed: int) -> None:
    for p, optimizer in both:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
        optimizer.step()
    torch.testing.assert_close(both[0][0], both[1][0])


def test_new_storage_loaded_state_and_other_objects_between_steps() -> None:
    both = pair()
    step_both(both, 1)
    for p, _ in both:
        p.data = p.data.clone()  # a wrapper moved it
    step_both(both, 2)
    for _, optimizer in both:
        optimizer.load_state_dict(optimizer.state_dict())
    step_both(both, 3)
    for k, (p, optimizer) in enumerate(both):  # swapped for another object, as Accelerate's FSDP2 does
        other = nn.Parameter(p.data)
        optimizer.param_groups[0]["params"][0] = other
        optimizer.state[other] = optimizer.state.pop(p)
        both[k] = (other, optimizer)
    step_both(both, 4)
    both[0][1].param_groups[0]["lr"] = both[1][1].param_groups[0]["lr"] = 0.01
    step_both(both, 5)
    for p, _ in both:
        p.data = p.data.double()
    with pytest.raises(RuntimeError):  # torch itself refuses a float gradient; a double one meets fp32 state
        both[0][0].grad = torch.zeros(6, 5)
        both[0][1].step()


def test_a_parameter_that_comes_late_and_one_that_pauses() -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    optimizer = AdamMini([("a.weight", a), ("b.weight", b)], lr=0.1)
    for step in range(4):
        a.grad = torch.ones(4, 3) if step != 2 else None
        b.grad = torch.ones(4, 3) if step > 1 else None
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (a, b)] == [3.0, 2.0]


def test_first_moments_in_another_dtype() -> None:
    p = nn.Parameter(torch.randn(8, 4).bfloat16())
    optimizer = AdamMini([("lm_head.weight", p)], exp_avg_dtype=torch.float32)
    p.grad = torch.randn(8, 4).bfloat16()
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype is torch.float32
    assert optimizer.state_bytes()["exp_avg"] == 8 * 4 * 4
    other = AdamMini([("lm_head.weight", p)], exp_avg_dtype=torch.bfloat16, fused=False)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[p]["exp_avg"].dtype is torch.bfloat16, "the running optimizer's dtype wins"
    assert other.param_groups[0]["fused"] is False
    with pytest.raises(ValueError, match="exp_avg_dtype='int7'"):
        AdamMini([p], exp_avg_dtype="int7")
    with pytest.raises(ValueError, match="fused='yes'"):
        AdamMini([p], fused="yes")  # type: ignore[arg-type]


def test_a_graph_that_needs_the_old_values_notices() -> None:
    """As with every in-place operation of torch: a backward pass after the step is an error, not a wrong gradient."""
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = AdamMini([("lm_head.weight", p)], fused=True)
    stale = (p * p).sum()
    p.grad = torch.ones(4, 3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
