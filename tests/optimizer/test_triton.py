"""The Triton step against the paper's transcription, under Triton's interpreter.

Triton decides whether to interpret when it is imported: the functions named ``check_...`` run in a process of their
own. What these tests cannot see: everything that the package's docstring says was never run on a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer import Layout
from optimizer.step.engines.foreach import foreach_update
from optimizer.step.engines.triton import accepts, triton_update
from optimizer.step.engines.triton.tables import Dense, tables
from optimizer.step.reference import initial_state, reference_step
from tests.optimizer.strategies import layouts

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
Pairs = list[tuple[Layout, tuple[int, ...]]]
SMALL: Pairs = [
    (Layout(0, [3, 3, 1, 1]), (8, 5)),
    (Layout.per_element((50,)), (50,)),
    (Layout(1, [4, 4]), (3, 8)),
    (Layout.per_tensor(()), ()),
    (Layout(0, [4] * 2), (8, 48)),
    (Layout.per_element((0, 3)), (0, 3)),
]


class Group:
    """Parameters with their state, on the CPU."""

    def __init__(self, pairs: Pairs, seed: int, dtype: torch.dtype = torch.float32, moment: torch.dtype | None = None):
        self.generator = torch.Generator().manual_seed(seed)
        self.layouts = [layout for layout, _ in pairs]
        self.params = [torch.randn(shape, generator=self.generator).to(dtype) for _, shape in pairs]
        self.moments = [torch.zeros_like(p, dtype=moment) for p in self.params]
        self.seconds = [torch.zeros(layout.aligned_shape(shape)) for layout, shape in pairs]
        self.steps = [torch.zeros(()) for _ in pairs]

    def grads(self, size: float = 1.0) -> list[Tensor]:
        return [(size * torch.randn(p.shape, generator=self.generator)).to(p.dtype) for p in self.params]

    def take(self, grads: list[Tensor], update: Any = triton_update, **options: Any) -> None:
        before = [g.clone() for g in grads]
        versions = [p._version for p in self.params]
        update(
            self.params, grads, self.moments, self.seconds, self.steps, self.layouts,
            **{"maximize": False} | COMMON | options,
        )  # fmt: skip
        assert all(torch.equal(g, b) or bool(g.isnan().any()) for g, b in zip(grads, before, strict=True))
        if update is triton_update and not options.get("found_inf"):
            assert all(p._version > old for p, old in zip(self.params, versions, strict=True)), "unseen by autograd"

    def tensors(self) -> list[Tensor]:
        return [t.clone() for t in (*self.params, *self.moments, *self.seconds, *self.steps)]


def against_the_reference(pairs: Pairs, seed: int, steps: int, *, maximize: bool = False) -> None:
    group = Group(pairs, seed)
    ids = [layout.block_ids(shape) for layout, shape in pairs]
    expected = [p.to(torch.float64) for p in group.params]
    states = [initial_state(p, i) for p, i in zip(expected, ids, strict=True)]
    for _ in range(steps):
        grads = group.grads()
        group.take(grads, maximize=maximize)
        for i, g in enumerate(grads):
            if g.numel():
                expected[i] = reference_step(
                    expected[i], g.to(torch.float64), states[i], ids[i], maximize=maximize, **COMMON
                )
    for i, (layout, shape) in enumerate(pairs):
        torch.testing.assert_close(group.params[i].to(torch.float64), expected[i], rtol=3e-6, atol=3e-6)
        v, view = group.seconds[i], shape
        if layout.fold > 1:
            v, view = v.unflatten(0, (layout.fold, -1)), (layout.fold, shape[0] // layout.fold, *shape[1:])
        spread = v.to(torch.float64).expand(view).reshape(shape)
        torch.testing.assert_close(spread, states[i].v[ids[i]].reshape(shape), rtol=1e-5, atol=0)
    assert [float(t) for t in group.steps] == [steps] * len(pairs)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(st.lists(layouts(), min_size=1, max_size=3), st.integers(0, 10_000), st.booleans())
def check_random_layouts(pairs: Any, seed: int, maximize: bool) -> None:
    against_the_reference(pairs, seed, 2, maximize=maximize)


def check_runs_cut_over_programs() -> None:
    pairs: Pairs = [
        (Layout.per_tensor((1, 40_001)), (1, 40_001)),  # one run, pieces that do not divide it
        (Layout(0, [128, 128, 1]), (257, 320)),  # long runs and rows in one tensor
        (Layout(1, [1] * 70), (300, 70)),  # columns, two tiles of them, two chunks of rows
        (Layout(1, [80] * 2 + [1] * 16), (300, 176)),  # columns in runs, rows at multiples of 16
        (Layout(1, [150, 150]), (5, 300)),  # spans across memory
        (Layout(2, [1] * 3, leading=(2,)), (2, 40, 3, 160)),  # the same, behind a leading axis
        (Layout.per_element((70, 64)), (70, 64)),
        (Layout(0, [1] * 3), (3, 5000)),  # rows longer than a tile
        (Layout(0, [5000]), (5000,)),  # one run of many indices
        (Layout(2, [1, 2] * 2, (2, 3), fold=2), (6, 6, 7)),
    ]
    against_the_reference(pairs, 0, 1)


def check_many_tensors() -> None:
    """More than one program's counters."""
    against_the_reference([(Layout.per_element((3,)), (3,))] * 140, 1, 1)


def check_dtypes() -> None:
    """The same as the foreach step to one unit in the last place.

    The interpreter cuts bf16 off where a device rounds: one step only, lest the bias adds up.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for moment in (torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = Group(SMALL, 2, dtype, moment), Group(SMALL, 2, dtype, moment)
            for _ in range(1 if torch.bfloat16 in (dtype, moment) else 2):
                grads = ours.grads(1e-4)
                ours.take(grads)
                theirs.take(grads, foreach_update)
            for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
                unit = torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=2e-6 + (unit if a.dtype != torch.float32 else 0), atol=2e-7)


def check_large_fp16_gradients_do_not_overflow() -> None:
    group = Group([(Layout(0, [1] * 4), (4, 600)), (Layout.per_tensor((1, 40_000)), (1, 40_000)),
                   (Layout(1, [1] * 3), (300, 3))], 3, torch.float16)  # fmt: skip
    group.take([torch.full(p.shape, 6e4, dtype=torch.float16) for p in group.params])
    for v in group.seconds:
        torch.testing.assert_close(v, torch.full_like(v, 0.05 * 3.6e9), rtol=1e-3, atol=0)
    assert all(bool(p.isfinite().all()) for p in group.params)


def check_scaled_and_skipped_steps() -> None:
    pairs = [*SMALL, (Layout.per_tensor((1, 40_000)), (1, 40_000)), (Layout(1, [1] * 3), (300, 3))]
    plain, scaled = Group(pairs, 4), Group(pairs, 4)
    for step in range(3):
        grads = plain.grads()
        overflow = step in (0, 2)  # a skipped first step, too
        if not overflow:
            plain.take(grads)
        large = [g * 1024 for g in grads]
        if overflow:
            for g in large:
                g.view(-1)[-1:] = torch.inf if step else torch.nan
        before = scaled.tensors()
        flag = torch.tensor(float(overflow))
        scaled.take(large, grad_scale=torch.tensor([1024.0]), found_inf=flag, capturable=True)
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(before, scaled.tensors(), strict=True))
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def check_tensors_as_hyper_parameters() -> None:
    numbers, tensors, other = Group(SMALL, 5), Group(SMALL, 5), Group(SMALL, 5)
    for _ in range(2):
        grads = numbers.grads()
        numbers.take(grads)
        tensors.take(grads, **{k: torch.tensor([COMMON[k]], dtype=torch.float64)
                               for k in ("lr", "beta1", "beta2", "weight_decay")})  # fmt: skip
        other.take(grads, lr=torch.tensor(2e-2), beta1=0.0)
    assert all(torch.equal(a, b) for a, b in zip(numbers.tensors(), tensors.tensors(), strict=True))
    assert not torch.equal(numbers.params[0], other.params[0])


def check_each_tensor_has_its_own_count() -> None:
    group, early = Group(SMALL, 6), Group(SMALL, 6)
    early.steps[1] += 10
    grads = group.grads()
    group.take(grads)
    early.take(grads)
    assert torch.equal(group.params[0], early.params[0])
    assert not torch.equal(group.params[1], early.params[1])


def check_compilers_see_one_operator() -> None:
    group, eager = Group(SMALL, 7), Group(SMALL, 7)
    compiled = torch.compile(triton_update, fullgraph=True, backend="aot_eager")
    for lr in (1e-2, 3e-2):
        grads = group.grads()
        with torch.no_grad(), torch.compiler.set_stance("default" if lr == 1e-2 else "fail_on_recompile"):
            compiled(
                group.params, grads, group.moments, group.seconds, group.steps, group.layouts,
                **COMMON | {"maximize": False, "lr": torch.tensor(lr)},
            )  # fmt: skip
        eager.take(grads, lr=torch.tensor(lr))
    assert all(torch.equal(a, b) for a, b in zip(group.tensors(), eager.tensors(), strict=True))


def in_a_process(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("checks", [
    ["check_runs_cut_over_programs", "check_many_tensors", "check_large_fp16_gradients_do_not_overflow"],
    ["check_random_layouts", "check_dtypes", "check_scaled_and_skipped_steps", "check_tensors_as_hyper_parameters",
     "check_each_tensor_has_its_own_count", "check_compilers_see_one_operator"],
])  # fmt: skip
def test_interpreted(checks: list[str]) -> None:
    calls = "\n".join(f"print({name!r}, flush=True); t.{name}()" for name in checks)
    in_a_process(f"from tests.optimizer import test_triton as t\n{calls}", TRITON_INTERPRET="1")


def test_nothing_imports_triton_before_it_is_used() -> None:
    in_a_process("import sys, optimizer, optimizer.step.engines.triton; assert 'triton' not in sys.modules")


def test_launches_do_not_grow_with_the_tensors() -> None:
    square = (512, 512)
    shapes = [Dense.of(layout, square) for layout in (Layout(0, [1] * 512), Layout(0, [128] * 4), Layout(1, [1] * 512))]
    shapes.append(Dense.of(Layout.per_element((512,)), (512,)))
    one, many = tables(shapes, torch.device("cpu")), tables(shapes * 40, torch.device("cpu"))
    assert [launch[:3] for launch in one.launches] == [launch[:3] for launch in many.launches]
    assert many.scratch == 40 * one.scratch <= 0.05 * 40 * sum(dense.numel for dense in shapes)
    assert list(Dense.read([n for dense in shapes for n in dense.numbers()])) == shapes


def test_what_the_kernels_take() -> None:
    """Without an interpreter, nothing on a CPU; nor, anywhere, what they cannot read right."""
    p, v = torch.zeros(4, 4), torch.zeros(4, 1)
    assert not accepts(p, p, p, v)
    in_a_process(
        "import torch; from optimizer.step.engines.triton import accepts, available\n"
        "p, v = torch.zeros(4, 4), torch.zeros(4, 1)\n"
        "assert available() and accepts(p, p, p, v) and accepts(p, p.bfloat16(), p.half(), v)\n"
        "assert not accepts(p.double(), p.double(), p.double(), v)\n"
        "assert not accepts(p.t(), p, p, v) and not accepts(p, p[:1].expand(4, 4), p, v)\n"
        "assert not accepts(torch.zeros(17)[1:], torch.zeros(16), torch.zeros(16), torch.zeros(16))",
        TRITON_INTERPRET="1",
    )
    with pytest.raises(ValueError, match="counters"):
        triton_update([p], [p], [p], [v], [torch.zeros((), device="meta")], [Layout(0, [1] * 4)],
                      maximize=False, capturable=True, **COMMON)  # fmt: skip
