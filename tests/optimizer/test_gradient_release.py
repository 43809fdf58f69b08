"""Gradient release: stepping inside the backward pass gives the numbers of the plain step, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimizer import AdamMini
from optimizer.memory import gradient_release
from tests.optimizer.models import GPT, Llama, batch, loss_of, train
from tests.optimizer.plain_steps import OPTIONS, one_cycle, same_state
from tests.optimizer.states import same_weights


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"exp_avg_dtype": torch.bfloat16}, {"maximize": True}])
@pytest.mark.parametrize("build", [Llama, lambda: GPT(tied=True)], ids=["llama", "tied gpt"])
def test_release_equals_the_plain_step(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    plain, released = build(), build()
    ours, theirs = AdamMini(released, **OPTIONS, **options), AdamMini(plain, **OPTIONS, **options)
    gradient_release(ours)
    train(plain, theirs, range(8), scheduler=one_cycle(theirs))
    train(released, ours, range(8), scheduler=one_cycle(ours))
    same_weights(released, plain)
    same_state(ours, theirs)


def test_release_holds_one_gradient_at_a_time() -> None:
    def most_gradients(model: nn.Module, release: bool) -> int:
        optimizer, seen = AdamMini(model, **OPTIONS), []
        if release:
            gradient_release(optimizer)
        for p in model.parameters():  # after the release's own hook
            p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in ps)))
        ps = list(model.parameters())
        loss_of(model, batch(11, 0)).backward()
        return max(seen)

    assert most_gradients(Llama(), release=True) == 0
    assert most_gradients(Llama(), release=False) == len(list(Llama().parameters()))


def test_accumulation_is_declared() -> None:
    plain, released = Llama(), Llama()
    ours, theirs = AdamMini(released, **OPTIONS), AdamMini(plain, **OPTIONS)
    release = gradient_release(ours)
    for t in range(0, 12, 3):
        with release.accumulate():
            loss_of(released, batch(11, t)).backward()
            loss_of(released, batch(11, t + 1)).backward()
        loss_of(released, batch(11, t + 2)).backward()
        ours.step()
        for k in range(3):
            loss_of(plain, batch(11, t + k)).backward()
        theirs.step()
        theirs.zero_grad()
    same_weights(released, plain)


def test_an_undeclared_second_backward_pass_is_refused() -> None:
    model = Llama()
    optimizer = AdamMini(model, **OPTIONS)
    gradient_release(optimizer)
    loss_of(model, batch(11, 0)).backward()
    with pytest.raises(RuntimeError, match=r"output\.weight.*second gradient.*release\.accumulate"):
        loss_of(model, batch(11, 1)).backward()


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
    same_weights(model, plain)


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

    same_weights(run(False, True), run(None, False))
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
    same_weights(released, plain)
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
            loss = loss_of(model, batch(11, t))
            loss.backward()
            return loss

        assert torch.equal(ours.step(lambda: closure(released, ours)), theirs.step(lambda: closure(plain, theirs)))
    same_weights(released, plain)
    assert calls == ["before", "after"] * 3


def test_remove_gives_the_plain_step_back() -> None:
    model, plain = Llama(), Llama()
    ours, theirs = AdamMini(model, **OPTIONS), AdamMini(plain, **OPTIONS)
    release = gradient_release(ours)
    with pytest.raises(RuntimeError, match="released already"):
        gradient_release(ours)
    train(model, ours, range(2))
    release.remove()
    loss_of(model, batch(11, 2)).backward()
    assert all(p.grad is not None for p in model.parameters())
    ours.step()
    train(plain, theirs, range(3))
    same_weights(model, plain)
    gradient_release(ours)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_is_refused(fused: bool | None) -> None:
    model = Llama()
    optimizer, scaler = AdamMini(model, **OPTIONS, fused=fused), torch.amp.GradScaler("cpu")
    gradient_release(optimizer)
    scaler.scale(loss_of(model, batch(11, 0))).backward()
    with pytest.raises(RuntimeError if fused else AssertionError, match="GradScaler" if fused else "No inf checks"):
        scaler.step(optimizer)


def test_differentiable_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiable=False"):
        gradient_release(AdamMini(Llama(), **OPTIONS, differentiable=True))


def test_release_is_refused_where_gradients_are_reduced_later(two_processes: None) -> None:
    with pytest.raises(RuntimeError, match="over 2 processes"):
        gradient_release(AdamMini(Llama(), **OPTIONS))
