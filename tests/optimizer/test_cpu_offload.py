"""Stepping inside the backward pass and on the host: the same numbers as the plain step, or a refusal.

What no test here can see: whether copies overlap with computation, and whether streams order them; this machine has no
accelerator, and the CPU's streams do nothing.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from optimizer import AdamMini
from optimizer.memory import CPUOffload, gradient_release
from tests.optimizer.models import GPT, Llama

OPTIONS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def tokens(t: int) -> Tensor:
    return torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(t))


def loss_of(model: nn.Module, t: int) -> Tensor:
    return F.cross_entropy(model(tokens(t)).flatten(0, 1), tokens(t + 1000).flatten())


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Changes lr and beta1 of every group at every step."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=40)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(20), scheduler: Any = None) -> None:
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(first: nn.Module, second: nn.Module) -> None:
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name


def same_state(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())


@pytest.fixture
def two_processes() -> Iterator[None]:
    """A process group that says it has two members and reduces nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("build", [lambda m: gradient_release(AdamMini(m, **OPTIONS)).optimizer,
                                   lambda m: CPUOffload(m, **OPTIONS)], ids=["release", "offload"])  # fmt: skip
def test_under_a_compiled_model_and_step(build: Any) -> None:
    plain, model = Llama(), Llama()
    train(plain, AdamMini(plain, **OPTIONS), range(3))
    optimizer = build(model)
    compiled, step = torch.compile(model, backend="eager"), torch.compile(optimizer.step, backend="eager")
    for t in range(3):
        loss_of(compiled, t).backward()
        step()
        optimizer.zero_grad()
    same(model, plain)


@pytest.mark.parametrize("build", [lambda m: gradient_release(AdamMini(m)).optimizer, CPUOffload])
def test_parameters_are_freed_with_their_optimizer(build: Any) -> None:
    model = Llama()
    optimizer = build(model)
    train(model, optimizer, range(1))
    alive = [weakref.ref(optimizer), *(weakref.ref(p) for p in model.parameters())]
    del model, optimizer
    gc.collect()
    assert not any(ref() is not None for ref in alive)


# Gradient release ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"exp_avg_dtype": torch.bfloat16}, {"maximize": True}])
@pytest.mark.parametrize("build", [Llama, lambda: GPT(tied=True)], ids=["llama", "tied gpt"])
def test_release_equals_the_plain_step(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    plain, released = build(), build()
    ours, theirs = AdamMini(released, **OPTIONS, **options), AdamMini(plain, **OPTIONS, **options)
    gradient_release(ours)
    train(plain, theirs, scheduler=one_cycle(theirs))
    train(released, ours, scheduler=one_cycle(ours))
    same(released, plain)
    same_state(ours, theirs)


def test_release_holds_one_gradient_at_a_time() -> None:
    def most_gradients(model: nn.Module, release: bool) -> int:
        optimizer, seen = AdamMini(model, **OPTIONS), []
        if release:
            gradient_release(optimizer)
        for p in model.parameters():  # after the release's own hook
            p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in ps)))
        ps = list(model.parameters())
        loss_of(model, 0).backward()
        return max(seen)

    assert most_gradients(Llama(), release=True) == 0
    assert most_gradients(Llama(), release=False) == len(list(Llama().parameters()))


def test_accumulation_is_declared() -> None:
    plain, released = Llama(), Llama()
    ours, theirs = AdamMini(released, **OPTIONS), AdamMini(plain, **OPTIONS)
    release = gradient_release(ours)
    for t in range(0, 12, 3):
        with release.accumulate():
            loss_of(released, t).backward()
            loss_of(released, t + 1).backward()
        loss_of(released, t + 2).backward()
        ours.step()
        for k in range(3):
            loss_of(plain, t + k).backward()
        theirs.step()
        theirs.zero_grad()
    same(released, plain)


def test_an_undeclared_second_backward_pass_is_refused() -> None:
    model = Llama()
    optimizer = AdamMini(model, **OPTIONS)
    gradient_release(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"output\.weight.*second gradient.*release\.accumulate"):
        loss_of(model, 1).backward()


def test_gradients_of_accumulating_passes_alone_are_taken_by_step() -> None:
    """A parameter that the last pass does not reach is not forgotten."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    plain = copy.deepcopy(model)
    ours, theirs = AdamMini(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    release = gradient_release(ours)
    x = torch.ones(2, 3)
    with release.accumulate():
        (model["a"](x) + model["b"](x)).square().sum().backward()
    model["a"](x).square().sum().backward()
    (plain["a"](x) + plain["b"](x)).square().sum().backward()
    plain["a"](x).square().sum().backward()
    ours.step()
    theirs.step()
    same(model, plain)


def test_a_weight_that_the_backward_pass_still_needs_is_noticed() -> None:
    """Detached use: autograd finishes the weight's gradient before the product that still reads the weight."""
    weight, x = nn.Parameter(torch.eye(3)), torch.ones(2, 3, requires_grad=True)
    release = gradient_release(AdamMini([weight], **OPTIONS))
    y = (x @ weight.detach()).square() @ weight
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    release.remove()


class Recomputed(nn.Module):
    """One weight in two checkpointed layers."""

    def __init__(self, *, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (
                self.layer(x).tanh() if self.reentrant is None
                else checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=self.reentrant)
            )  # fmt: skip
        return x


def test_recomputed_layers_see_the_weights_of_the_forward_pass() -> None:
    def run(reentrant: bool | None, release: bool) -> nn.Module:
        model = Recomputed(reentrant=reentrant)
        optimizer = AdamMini(model, **OPTIONS)
        if release:
            gradient_release(optimizer)
        for t in range(3):
            model(torch.full((2, 4), t + 1.0, requires_grad=True)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    same(run(False, True), run(None, False))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(True, True)


def test_parameters_added_and_thawed_later_are_released_from_the_next_step_on() -> None:
    def run(release: bool) -> tuple[nn.Module, list[bool]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight.requires_grad_(False)
        optimizer = AdamMini([*model[0].parameters(), *model[1].parameters()], **OPTIONS)
        if release:
            gradient_release(optimizer)
        left = []
        for t in range(6):
            if t == 2:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1e-3})
                model[1].weight.requires_grad_(True)
            model(torch.ones(2, 4)).square().sum().backward()
            left.append(any(p.grad is not None for p in model[:2].parameters()) or model[1].weight.grad is not None)
            optimizer.step()
            if t < 2:
                model[2].zero_grad()
            optimizer.zero_grad()
        return model, left

    released, left = run(True)
    plain, all_left = run(False)
    same(released, plain)
    assert left == [False, False, True, False, False, False] and all(all_left)


def test_closures_and_hooks_run_once_a_step() -> None:
    plain, released, calls = Llama(), Llama(), []
    ours, theirs = AdamMini(released, **OPTIONS), AdamMini(plain, **OPTIONS)
    gradient_release(ours)
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    for t in range(3):

        def closure(model: nn.Module, optimizer: AdamMini, t: int = t) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss

        assert torch.equal(ours.step(lambda: closure(released, ours)), theirs.step(lambda: closure(plain, theirs)))
    same(released, plain)
    assert calls == ["before", "after"] * 3


def test_remove_gives_the_plain_step_back() -> None:
    model, plain = Llama(), Llama()
    ours, theirs = AdamMini(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    release = gradient_release(ours)
    with pytest.raises(RuntimeError, match="released already"):
        gradient_release(ours)
    train(model, ours, range(2))
    release.remove()
    loss_of(model, 2).backward()
    assert all(p.grad is not None for p in model.parameters())
    ours.step()
    train(plain, theirs, range(3))
    same(model, plain)
    gradient_release(ours)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_is_refused(fused: bool | None) -> None:
    model = Llama()
    optimizer, scaler = AdamMini(model, **OPTIONS, fused=fused), torch.amp.GradScaler("cpu")
    gradient_release(optimizer)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError if fused else AssertionError, match="GradScaler" if fused else "No inf checks"):
        scaler.step(optimizer)


def test_differentiable_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiable=False"):
        gradient_release(AdamMini(Llama(), **OPTIONS, differentiable=True))


def test_release_is_refused_where_gradients_are_reduced_later(two_processes: None) -> None:
    with pytest.raises(RuntimeError, match="over 2 processes"):
        gradient_release(AdamMini(Llama(), **OPTIONS))


# CPU offload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"bf16_rounding": "kahan", "exp_avg_dtype": torch.bfloat16}])
@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("build", [Llama, lambda: GPT(tied=True).bfloat16()], ids=["llama", "tied gpt in bf16"])
def test_offload_equals_the_step_in_place(
    build: Callable[[], nn.Module], offload_gradients: bool, options: dict[str, Any]
) -> None:
    plain, model = build(), build()
    ours = CPUOffload(model, **OPTIONS, **options, offload_gradients=offload_gradients)
    theirs = AdamMini(plain, **OPTIONS, **options)
    train(plain, theirs, scheduler=one_cycle(theirs))
    train(model, ours, scheduler=one_cycle(ours))
    same(model, plain)
    same_state(ours, theirs)
    assert ours.state_bytes() == theirs.state_bytes()


@pytest.mark.parametrize("resumed", [CPUOffload, AdamMini])
@pytest.mark.parametrize("saved", [CPUOffload, AdamMini])
def test_offload_resumes_from_its_own_and_from_the_plain_state(saved: Any, resumed: Any) -> None:
    whole, first, second = Llama(), Llama(), Llama(seed=1)
    train(whole, AdamMini(whole, **OPTIONS))
    start = saved(first, **OPTIONS)
    train(first, start, range(8))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": start.state_dict()}, file)
    file.seek(0)
    document = torch.load(file, weights_only=True)
    goal = resumed(second, **{**OPTIONS, "lr": 1.0})
    goal.load_state_dict(document["optimizer"])
    second.load_state_dict(document["model"])  # after the optimizer: its copies are older than the parameters
    train(second, goal, range(8, 20))
    same(second, whole)


def test_offloaded_gradients_are_freed_and_may_not_accumulate() -> None:
    model = Llama()
    optimizer = CPUOffload(model, **OPTIONS, offload_gradients=True)
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"second gradient.*offload_gradients=False"):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "gradients were cleared"


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, t).backward()
    loss_of(model, t + 1).backward()
    optimizer.step()


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, t).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def replace(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, t).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad.sign()
    optimizer.step()


def abandon(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    """A backward pass that comes to nothing, then one that misses a layer."""
    loss_of(model, t).backward()
    model.zero_grad()
    loss_of(model, t + 1).backward()
    model.output.weight.grad = None
    optimizer.step()


def average(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, t).backward()
    optimizer.step()
    with torch.no_grad():
        model.output.weight.mul_(0.9)


@pytest.mark.parametrize("iteration", [accumulate, clip, replace, abandon, average])
def test_offload_sees_what_happens_to_gradients_and_parameters(iteration: Any) -> None:
    plain, model = Llama(), Llama()
    ours, theirs = CPUOffload(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    for t in range(4):
        for subject, optimizer in ((model, ours), (plain, theirs)):
            iteration(subject, optimizer, t)
            optimizer.zero_grad()
    same(model, plain)


@pytest.mark.parametrize("unscale", [False, True])
def test_offload_takes_a_scaler(unscale: bool) -> None:
    """Unscaling by hand changes gradients in place without a trace in their version counters."""

    def run(build: Any) -> tuple[nn.Module, list[float]]:
        model = Llama()
        optimizer, scales = build(model), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for t in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, t) * (float("inf") if t == 3 else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return model, scales

    model, scales = run(lambda model: CPUOffload(model, **OPTIONS))
    plain, expected = run(lambda model: AdamMini(model, **OPTIONS, fused=True))
    assert scales == expected == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]  # grown, halved at inf, grown
    same(model, plain)


def test_offload_refuses_a_scaler_that_can_see_no_gradients() -> None:
    model = Llama()
    optimizer, scaler = CPUOffload(model, **OPTIONS, offload_gradients=True), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="offload_gradients=False"):
        scaler.step(optimizer)


def test_offload_takes_groups_and_thawed_parameters_later() -> None:
    def run(build: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].weight.requires_grad_(False)
        optimizer = build(model[0].named_parameters())
        for t in range(6):
            if t == 2:
                optimizer.add_param_group({"params": list(model[1].named_parameters()), "lr": 1e-3})
                model[0].weight.requires_grad_(True)
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            model.zero_grad()
        return model, optimizer

    (model, ours), (plain, theirs) = run(lambda ps: CPUOffload(ps, **OPTIONS)), run(lambda ps: AdamMini(ps, **OPTIONS))
    same(model, plain)
    same_state(ours, theirs)


def test_offload_makes_state_at_once_where_asked() -> None:
    model, plain = Llama(), Llama()
    ours, theirs = CPUOffload(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    ours.init_state()
    theirs.init_state()
    same_state(ours, theirs)
    assert ours.state.keys() == set(model.parameters())


def test_offload_keeps_its_hooks_and_closures() -> None:
    model, calls = Llama(), []
    optimizer = CPUOffload(model, **OPTIONS)
    optimizer.register_state_dict_post_hook(lambda _, document: {**document, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, document: calls.append(document.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o is optimizer))

    def closure() -> Tensor:
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), loss_of(Llama(), 0))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [1, True]


def test_offload_refusals(two_processes: None) -> None:
    for option in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{option}=False"):
            CPUOffload(Llama(), **OPTIONS, **{option: True})
    model = Llama()
    optimizer = CPUOffload(model, **OPTIONS)
    with pytest.raises(TypeError, match=r"save state_dict\(\)"):
        pickle.dumps(optimizer)
    eager = CPUOffload(model, **OPTIONS, offload_gradients=True)
    with pytest.raises(RuntimeError, match="before they are reduced"):
        loss_of(model, 0).backward()
    assert eager.offload_gradients


def test_offload_waits_for_step_where_gradients_are_reduced_later(two_processes: None) -> None:
    """The all-reduce may write a gradient without a trace; here one through ``data`` stands in for it."""
    plain, model = Llama(), Llama()
    ours, theirs = CPUOffload(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    for subject, optimizer in ((model, ours), (plain, theirs)):
        loss_of(subject, 0).backward()
        for p in subject.parameters():
            assert p.grad is not None
            p.grad.data.mul_(-0.5)
        optimizer.step()
    same(model, plain)


def test_a_sparse_gradient_is_refused_when_it_arrives() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = CPUOffload(embedding, **OPTIONS)
    with pytest.raises(RuntimeError, match="sparse gradient"):
        embedding(torch.tensor([1])).sum().backward()
    assert not optimizer.state
