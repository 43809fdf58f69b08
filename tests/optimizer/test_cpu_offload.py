"""CPU offload: stepping on the host gives the numbers of the plain step, or is refused.

These tests cannot see whether copies overlap with computation, nor whether streams order them: this machine has no
accelerator, and the CPU's streams do nothing.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer import AdamMini
from optimizer.memory import CPUOffload
from tests.optimizer.models import GPT, Llama, batch, loss_of, train
from tests.optimizer.plain_steps import OPTIONS, one_cycle, same_state
from tests.optimizer.states import same_weights


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"bf16_rounding": "kahan", "exp_avg_dtype": torch.bfloat16}])
@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("build", [Llama, lambda: GPT(tied=True).bfloat16()], ids=["llama", "tied gpt in bf16"])
def test_offload_equals_the_step_in_place(
    build: Callable[[], nn.Module], offload_gradients: bool, options: dict[str, Any]
) -> None:
    plain, model = build(), build()
    ours = CPUOffload(model, **OPTIONS, **options, offload_gradients=offload_gradients)
    theirs = AdamMini(plain, **OPTIONS, **options)
    train(plain, theirs, range(8), scheduler=one_cycle(theirs))
    train(model, ours, range(8), scheduler=one_cycle(ours))
    same_weights(model, plain)
    same_state(ours, theirs)
    assert ours.state_bytes() == theirs.state_bytes()


@pytest.mark.parametrize("resumed", [CPUOffload, AdamMini])
@pytest.mark.parametrize("saved", [CPUOffload, AdamMini])
def test_offload_resumes_from_its_own_and_from_the_plain_state(saved: Any, resumed: Any) -> None:
    whole, first, second = Llama(), Llama(), Llama(seed=1)
    train(whole, AdamMini(whole, **OPTIONS), range(8))
    start = saved(first, **OPTIONS)
    train(first, start, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": start.state_dict()}, file)
    file.seek(0)
    document = torch.load(file, weights_only=True)
    goal = resumed(second, **{**OPTIONS, "lr": 1.0})
    goal.load_state_dict(document["optimizer"])
    second.load_state_dict(document["model"])  # after the optimizer: its copies are older than the parameters
    train(second, goal, range(4, 8))
    same_weights(second, whole)


def test_offloaded_gradients_are_freed_and_may_not_accumulate() -> None:
    model = Llama()
    optimizer = CPUOffload(model, **OPTIONS, offload_gradients=True)
    loss_of(model, batch(11, 0)).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"second gradient.*offload_gradients=False"):
        loss_of(model, batch(11, 1)).backward()
    optimizer.zero_grad()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "gradients were cleared"


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, batch(11, t)).backward()
    loss_of(model, batch(11, t + 1)).backward()
    optimizer.step()


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, batch(11, t)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def replace(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, batch(11, t)).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad.sign()
    optimizer.step()


def abandon(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    """A backward pass that comes to nothing, then one that misses a layer."""
    loss_of(model, batch(11, t)).backward()
    model.zero_grad()
    loss_of(model, batch(11, t + 1)).backward()
    model.output.weight.grad = None
    optimizer.step()


def average(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    loss_of(model, batch(11, t)).backward()
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
    same_weights(model, plain)


@pytest.mark.parametrize("unscale", [False, True])
def test_offload_takes_a_scaler(unscale: bool) -> None:
    """Unscaling by hand changes gradients in place without a trace in their version counters."""

    def run(build: Any) -> tuple[nn.Module, list[float]]:
        model = Llama()
        optimizer, scales = build(model), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for t in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(11, t)) * (float("inf") if t == 3 else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return model, scales

    model, scales = run(lambda model: CPUOffload(model, **OPTIONS))
    plain, expected = run(lambda model: AdamMini(model, **OPTIONS, fused=True))
    assert scales == expected == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]  # grown, halved at inf, grown
    same_weights(model, plain)


def test_offload_refuses_a_scaler_that_can_see_no_gradients() -> None:
    model = Llama()
    optimizer, scaler = CPUOffload(model, **OPTIONS, offload_gradients=True), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(11, 0))).backward()
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
    same_weights(model, plain)
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
        loss = loss_of(model, batch(11, 0))
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), loss_of(Llama(), batch(11, 0)))
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
        loss_of(model, batch(11, 0)).backward()
    assert eager.offload_gradients


def test_offload_waits_for_step_where_gradients_are_reduced_later(two_processes: None) -> None:
    """The all-reduce may write a gradient without a trace; here one through ``data`` stands in for it."""
    plain, model = Llama(), Llama()
    ours, theirs = CPUOffload(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    for subject, optimizer in ((model, ours), (plain, theirs)):
        loss_of(subject, batch(11, 0)).backward()
        for p in subject.parameters():
            assert p.grad is not None
            p.grad.data.mul_(-0.5)
        optimizer.step()
    same_weights(model, plain)


def test_a_sparse_gradient_is_refused_when_it_arrives() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = CPUOffload(embedding, **OPTIONS)
    with pytest.raises(RuntimeError, match="sparse gradient"):
        embedding(torch.tensor([1])).sum().backward()
    assert not optimizer.state
