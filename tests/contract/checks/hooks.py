"""Hooks, closures, and what profilers see."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from tests.contract.harness import (
    LR,
    Named,
    assert_moved,
    assert_same,
    check,
    give_gradients,
    named,
    one,
    pair,
    random_steps,
    tensors,
    trained,
    values,
)
from tests.contract.subjects import Subject


def _with_its_bases(subject: Subject, pairs: Named, **options: Any) -> Any:
    """The optimizer, after each class it derives from has been used as well: torch patches ``step`` at first use."""
    optimizer = subject.make(pairs, **options)
    for base in type(optimizer).__mro__[1:]:
        if issubclass(base, torch.optim.Optimizer) and base is not torch.optim.Optimizer:
            base(named())  # type: ignore[call-arg]
    return subject.make(pairs, **options)


@check
def step_returns_nothing_without_a_closure(subject: Subject) -> None:
    """Trainers tell "no loss" by None."""
    optimizer, pairs = subject.make(pairs := named()), pairs
    give_gradients(tensors(pairs), 0)
    assert optimizer.step() is None


@check
def a_closure_computes_gradients_and_its_loss_comes_back(subject: Subject) -> None:
    """optimizer.step(closure), as LBFGS users and Lightning call it, even under no_grad."""
    p = one()
    optimizer, calls = subject.make(pair(p), lr=LR), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = values([p])
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss is not None and loss.item() == (before[0] * before[0]).sum().item()
    assert_moved([p], before)


@check
def a_closure_may_be_given_by_keyword(subject: Subject) -> None:
    """GradScaler, Lightning and DCP call step(closure=...)."""
    optimizer = subject.make(named())
    assert optimizer.step(closure=lambda: 3.5) == 3.5 and optimizer.step(closure=None) is None


@check
def hooks_before_and_after_the_step(subject: Subject) -> None:
    """Gradient accumulation and logging hang on register_step_pre_hook and register_step_post_hook."""
    p = one()
    optimizer, seen = _with_its_bases(subject, pair(p), lr=LR), []
    before = values([p])[0]
    first = optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", o, torch.equal(p, before))))
    second = optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", o, torch.equal(p, before))))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert seen == [("pre", optimizer, True), ("post", optimizer, False)]
    first.remove()
    second.remove()
    optimizer.step()
    assert len(seen) == 2, "a removed hook was called"


@check
def a_hook_before_the_step_may_replace_the_arguments(subject: Subject) -> None:
    """A pre-hook that returns (args, kwargs) supplies the closure."""
    optimizer = subject.make(named())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 2.5), {}))
    assert optimizer.step() == 2.5


@check
def hooks_on_every_optimizer(subject: Subject) -> None:
    """register_optimizer_step_pre_hook and _post_hook, by which monitors see all optimizers of a process."""
    p = one()
    optimizer, seen = _with_its_bases(subject, pair(p)), []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append(("post", o))),
    ]
    try:
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("pre", optimizer), ("post", optimizer)]


@check
def the_step_is_hooked_once(subject: Subject) -> None:
    """A second instance, or one of the class it derives from, must not make hooks run twice."""
    for _ in range(2):
        optimizer, calls = _with_its_bases(subject, named()), []
        optimizer.register_step_pre_hook(lambda o, a, k, calls=calls: calls.append(1))  # type: ignore[misc]
        optimizer.step()
        assert calls == [1]


@check
def hooks_around_saving(subject: Subject) -> None:
    """register_state_dict_pre_hook sees the optimizer, the post hook its dict, in this order."""
    optimizer, _ = trained(subject)
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append(sorted(d)))
    optimizer.state_dict()
    assert seen == [optimizer, ["param_groups", "state"]]


@check
def a_hook_after_saving_may_return_another_dict(subject: Subject) -> None:
    """Checkpoint formats with metadata are made by a state_dict post hook."""
    optimizer, _ = trained(subject)
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "format": 2})
    assert optimizer.state_dict()["format"] == 2


@check
def hooks_around_loading(subject: Subject) -> None:
    """register_load_state_dict_pre_hook and _post_hook run before and after the state is there."""
    source, _ = trained(subject)
    target, seen = subject.make(named(), lr=LR), []
    target.register_load_state_dict_pre_hook(lambda o, d: seen.append(("pre", o, len(o.state))))
    target.register_load_state_dict_post_hook(lambda o: seen.append(("post", o, len(o.state))))
    target.load_state_dict(source.state_dict())
    assert seen == [("pre", target, 0), ("post", target, len(source.state))]


@check
def what_a_hook_after_loading_sees_is_final(subject: Subject) -> None:
    """A post hook that changes the loaded state, say an exp_avg of zeros, has the last word."""
    source, _ = trained(subject)
    target = subject.make(pairs := named(), lr=LR)
    target.register_load_state_dict_post_hook(lambda o: [s["exp_avg"].zero_() for s in o.state.values()] and None)
    target.load_state_dict(source.state_dict())
    assert not any(target.state[p]["exp_avg"].any() for p in tensors(pairs))


@check
def a_hook_before_loading_may_return_another_dict(subject: Subject) -> None:
    """Old checkpoints are converted by a pre hook that returns the new dict."""
    source, pairs = trained(subject)
    target = subject.make(others := named(), lr=LR)
    target.register_load_state_dict_pre_hook(lambda o, d: d["optimizer"])
    target.load_state_dict({"optimizer": copy.deepcopy(source.state_dict())})
    for p, q in zip(tensors(pairs), tensors(others), strict=True):
        q.data.copy_(p)
    random_steps(source, tensors(pairs), 2, start=3)
    random_steps(target, tensors(others), 2, start=3)
    assert_same(tensors(pairs), tensors(others))


@check
def profilers_see_the_step_by_its_class(subject: Subject) -> None:
    """Profiler traces call it Optimizer.step#Class.step, and zero_grad likewise."""
    optimizer, pairs = trained(subject)
    name = type(optimizer).__name__
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        random_steps(optimizer, tensors(pairs), 1)
    keys = {event.key for event in trace.key_averages()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= keys
