"""The Triton step of factored second moments against the eager one, under Triton's interpreter; and its dispatch.

As in ``test_triton``, functions named ``check_...`` run in a process of their own, in which Triton interprets.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from optimizer import AdamMini, Layout
from optimizer.partition import FactoredLayout
from optimizer.partition.factored import TensorLayout
from optimizer.step.engines import checks, native, triton
from optimizer.step.engines.dispatch import Item, run
from optimizer.step.engines.triton.factored_tables import Matrix
from optimizer.step.engines.triton.tables import tables
from optimizer.step.factored import factored_update
from optimizer.step.hyper import Hyper
from tests.optimizer.test_factored import HYPER, factored_layouts, state_of
from tests.optimizer.test_triton import in_a_process

Pairs = list[tuple[FactoredLayout, tuple[int, ...]]]
SMALL: Pairs = [
    (FactoredLayout((6, 5), 0), (6, 5)),
    (FactoredLayout((3, 6), 1, [(0, 2), (1, 1)], repeat=2), (3, 6)),
    (FactoredLayout((0, 5), 0), (0, 5)),
]
KERNELS = ("factored_sums", "factored_moments", "factored_update")


class Group:
    """Parameters with their state on the CPU, and the same in float64 for the eager step."""

    def __init__(self, pairs: Pairs, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layouts = [layout for layout, _ in pairs]
        self.params = [torch.randn(shape, generator=self.generator).to(dtype) for _, shape in pairs]
        self.states = [state_of(p, layout) for p, layout in zip(self.params, self.layouts, strict=True)]
        self.exact = [p.double() for p in self.params]
        self.exact_states = [state_of(p, layout) for p, layout in zip(self.exact, self.layouts, strict=True)]

    def grads(self, size: float = 1.0) -> list[Tensor]:
        return [(size * torch.randn(p.shape, generator=self.generator)).to(p.dtype) for p in self.params]

    def take(self, grads: list[Tensor], **options: Any) -> None:
        """Take the Triton step."""
        columns = [[s[name] for s in self.states] for name in ("exp_avg", "exp_avg_sq", "step", "exp_avg_sq_col")]
        versions = [c._version for c in columns[3]]
        triton.triton_update(
            self.params, grads, *columns[:3], self.layouts, exp_avg_sq_cols=columns[3], **HYPER | options
        )
        assert all(c._version > old for c, old in zip(columns[3], versions, strict=True)), "unseen by autograd"

    def take_exactly(self, grads: list[Tensor], step: int, **options: Any) -> None:
        """Take the eager step in float64."""
        for p, g, state, layout in zip(self.exact, grads, self.exact_states, self.layouts, strict=True):
            moments = (state[name] for name in ("exp_avg", "exp_avg_sq", "exp_avg_sq_col"))
            factored_update(p, g.double(), *moments, layout, step=step, **HYPER | options)

    def compare(self, rtol: float = 3e-6, atol: float = 3e-6) -> None:
        for p, exact, state, wanted in zip(self.params, self.exact, self.states, self.exact_states, strict=True):
            torch.testing.assert_close(p.double(), exact, rtol=rtol, atol=atol)
            torch.testing.assert_close(state["exp_avg"].double(), wanted["exp_avg"], rtol=rtol, atol=atol)
            for name in ("exp_avg_sq", "exp_avg_sq_col"):
                torch.testing.assert_close(state[name].double(), wanted[name], rtol=1e-5, atol=0)

    def tensors(self) -> list[Tensor]:
        return [t.clone() for t in (*self.params, *(t for state in self.states for t in state.values()))]


def against_the_eager_step(pairs: Pairs, seed: int, *, steps: int = 2, **options: Any) -> None:
    group = Group(pairs, seed)
    for step in range(1, steps + 1):
        grads = group.grads()
        group.take(grads, **options)
        group.take_exactly(grads, step, **options)
    group.compare()
    assert [float(state["step"]) for state in group.states] == [steps] * len(pairs)


# A failure is not made smaller, because that would take minutes.
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None, phases=[Phase.generate]
)
@given(factored_layouts(), st.integers(0, 10_000), st.booleans())
def check_random_layouts(pair: Any, seed: int, maximize: bool) -> None:
    against_the_eager_step([pair], seed, maximize=maximize)


def check_every_form_of_tile() -> None:
    """More than one tile along each direction, wide and narrow, along the rows and across; and a part without rows."""
    pairs: Pairs = [
        (FactoredLayout((70, 272), 0), (70, 272)),  # wide: 64 rows, 256 columns
        (FactoredLayout((66, 272), 1, [(0, 128), (1, 144)]), (66, 272)),  # wide, in the order of GPT-2's Conv1D
        (FactoredLayout((257, 33), 0, [(0, 256), (1, 1)]), (257, 33)),  # narrow: 256 rows, 32 columns
        (FactoredLayout((257, 40), 1, [(0, 33), (1, 7)], parts=3), (257, 40)),  # narrow, in the order of Conv1D
        (FactoredLayout((2, 3, 2, 136), 2, [(0, 1), (1, 1)], leading=1), (2, 3, 2, 136)),  # between and inner
        (FactoredLayout((2, 8208), 0), (2, 8208)),  # many partial sums
    ]
    against_the_eager_step(pairs, 0, steps=1)


def check_dtypes() -> None:
    """One step only, because the interpreter cuts bf16 off where a device rounds."""
    for dtype in (torch.bfloat16, torch.float16):
        group = Group(SMALL, 2, dtype)
        grads = group.grads(1e-2)
        group.take(grads)
        group.take_exactly(grads, 1)
        group.compare(rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def check_special_gradients() -> None:
    """Zero rows stay; beside an infinite gradient nothing finite moves, also later; large squares do not overflow."""
    group, before = Group(SMALL[:2], 3), Group(SMALL[:2], 3).params
    for step in (1, 2):
        grads = group.grads()
        grads[0][2], grads[0][:, 3] = 0, 0
        if step == 1:
            grads[1][1, 2] = torch.inf  # of the second part, whose rows are 2 and 5
        group.take(grads, weight_decay=0.0)
        still = group.params[0] == before[0]
        assert still[2].all() and still[:, 3].all() and not still[0, 0]
        still = group.params[1] == before[1]
        assert still[[0, 2], 2].all() and still[:, 5].all() and not still[:, [0, 1, 3, 4]].any()
    group = Group(SMALL[:1], 3)
    group.take([torch.zeros(6, 5)], weight_decay=0.0)
    assert torch.equal(group.params[0], before[0])
    group.take([torch.full((6, 5), 1e18)], weight_decay=0.0, beta1=0.0, beta2=0.0)
    torch.testing.assert_close(group.params[0], before[0] - HYPER["lr"])


def check_scaled_and_skipped_steps() -> None:
    plain, scaled = Group(SMALL, 4), Group(SMALL, 4)
    for step in range(3):
        grads = plain.grads()
        overflow = step in (0, 2)  # a skipped first step, too
        if not overflow:
            plain.take(grads)
        large = [g * 1024 for g in grads]
        for g in large[:2] if overflow else []:
            g.view(-1)[-1] = torch.inf if step else torch.nan
        before = scaled.tensors()
        flag = torch.tensor(float(overflow))
        scaled.take(large, grad_scale=torch.tensor([1024.0]), found_inf=flag, capturable=True)
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(before, scaled.tensors(), strict=True))
    for a, b in zip(plain.tensors(), scaled.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def check_tensors_as_hyper_parameters() -> None:
    numbers, tensors = Group(SMALL, 5), Group(SMALL, 5)
    grads = numbers.grads()
    numbers.take(grads)
    names = ("lr", "beta1", "beta2", "weight_decay")
    tensors.take(grads, **{k: torch.tensor([HYPER[k]], dtype=torch.float64) for k in names})
    assert all(torch.equal(a, b) for a, b in zip(numbers.tensors(), tensors.tensors(), strict=True))


def check_the_optimizer_launches_three_kernels() -> None:
    """For all factored tensors together, and leaves tensors that the kernels cannot read to the eager step."""
    from optimizer.step.engines.triton import factored_kernels

    native.available = lambda: False  # type: ignore[assignment]
    counts = dict.fromkeys(KERNELS, 0)

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(factored_kernels, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            counts[self.name] += 1
            return self.kernel[grid]

    for name in KERNELS:
        setattr(factored_kernels, name, Counted(name))
    layers = nn.Sequential(*(nn.Linear(5, 4) for _ in range(3)))
    exact = copy.deepcopy(layers).double()
    pairs = [AdamMini(model, rules="factored", foreach=how) for model, how in ((layers, None), (exact, False))]
    for step in range(2):
        for p, q in zip(layers.parameters(), exact.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            if step and p is layers[0].weight:
                p.grad = p.grad.t().contiguous().t()
            q.grad = p.grad.double()
        for optimizer in pairs:
            optimizer.step()
    assert counts == dict.fromkeys(KERNELS, 2)
    for p, q in zip(layers.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=3e-6, atol=3e-6)
    p, column = torch.zeros(4, 4), torch.zeros(1, 4)
    assert triton.accepts(p, p, p, p[:, :1].contiguous(), column)
    assert "exp_avg_sq_col has strides" in str(triton.obstacle(p, p, p, p, p[:2, :2]))
    assert "exp_avg_sq_col is torch.float64" in str(triton.obstacle(p, p, p, p, column.double()))
    assert "multiple of 16 bytes" in str(triton.obstacle(p, p, p, p, torch.zeros(5)[1:]))


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]


def test_interpreted() -> None:
    calls = "\n".join(f"print({name!r}, flush=True); t.{name}()" for name in CHECKS)
    in_a_process(f"from tests.optimizer import test_triton_factored as t\n{calls}", TRITON_INTERPRET="1")


def test_launches_do_not_grow_with_the_tensors() -> None:
    pairs: Pairs = [
        (FactoredLayout((512, 512), 0), (512, 512)),
        (FactoredLayout((512, 1536), 1, [(0, 512), (1, 512), (2, 512)]), (512, 1536)),
        (FactoredLayout((512, 63), 0), (512, 63)),
    ]
    matrices = [Matrix.of(layout, shape) for layout, shape in pairs]
    assert [matrix.wide for matrix in matrices] == [True, True, False]
    assert list(Matrix.read([n for matrix in matrices for n in matrix.numbers()])) == matrices
    one, many = tables(matrices, torch.device("cpu")), tables(matrices * 40, torch.device("cpu"))
    assert [launch.kernel for launch in one.launches] == [launch.kernel for launch in many.launches] == list(KERNELS)
    assert many.scratch == 40 * one.scratch <= 0.05 * 40 * sum(matrix.numel for matrix in matrices)


def test_fused_on_cuda_accepts_what_the_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors without memory, whose device is only a name."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton, "available", lambda: True)
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(4, 5, device="cuda"))
        state = {
            "exp_avg": torch.empty(4, 5, device="cuda"),
            "exp_avg_sq": torch.empty(4, 1, device="cuda"),
            "exp_avg_sq_col": torch.empty(1, 5, device="cuda"),
        }
        group = AdamMini([("weight", p)], fused=True).param_groups[0]
        with pytest.raises(RuntimeError, match=r"weight.*its parameter is .*; use fused=None"):
            checks.require_takeable(p, torch.empty_like(p), state, group, "weight")
        monkeypatch.setattr(triton, "obstacle", lambda *tensors: asked.append(tensors))
        checks.require_takeable(p, torch.empty_like(p), state, group, "weight")
    assert asked[0][2:] == tuple(state.values())


@pytest.mark.parametrize("how", [{"foreach": False}, {"capturable": True}, {"differentiable": True}])
@pytest.mark.parametrize("layout", [FactoredLayout((4, 5), 0), Layout(0, [2, 2])])
def test_tensors_stepped_alone_obey_a_scaler(how: dict[str, bool], layout: TensorLayout) -> None:
    """The optimizer leaves a scaler's verdict to the engines on every device but the CPU."""
    options: dict[str, Any] = dict.fromkeys(("fused", "capturable", "differentiable"), False)
    options |= {"foreach": None, "bf16_rounding": None} | how
    lr = torch.tensor(HYPER["lr"], requires_grad=options["differentiable"])
    g, taken = torch.randn(4, 5), []
    for grad, scale, verdicts in ((g, None, [0]), (g * 1024, torch.tensor(1024.0), [1, 0, 1])):
        p = torch.ones(4, 5)
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 5), "exp_avg_sq": torch.zeros(4, 1)}
        if isinstance(layout, FactoredLayout):
            state["exp_avg_sq_col"] = torch.zeros(1, 5)
        for verdict in verdicts:
            found_inf = None if scale is None else torch.tensor([float(verdict)])
            hyper = Hyper(**HYPER | {"lr": lr}, grad_scale=scale, found_inf=found_inf)
            given_grad = torch.full_like(grad, torch.nan) if verdict else grad
            run([Item(0, 0, p, given_grad, state, layout)], options, hyper)
        taken.append([p, *state.values()])
    for plain, scaled in zip(*taken, strict=True):
        torch.testing.assert_close(scaled, plain)
    assert not torch.equal(taken[0][0], torch.ones(4, 5))
    if lr.requires_grad:
        assert torch.autograd.grad(taken[1][0].sum(), lr)[0].isfinite(), "a skipped step reached autograd"
