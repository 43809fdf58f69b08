"""foreach, fused, capturable, differentiable: what torch refuses, and what they promise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.contract.harness import (
    LR,
    assert_close,
    assert_moved,
    assert_refused,
    assert_same,
    check,
    give_gradients,
    give_signs,
    named,
    one,
    pair,
    random_steps,
    set_all,
    tensors,
    trained,
    values,
)
from tests.contract.subjects import Subject


def _plain(subject: Subject) -> bool:
    """Checks that set the flags themselves: once per class is enough, and the door has no flags to set."""
    return subject.engine == "any" and subject.arguments


@check(applies=_plain)
def foreach_and_fused_exclude_each_other(subject: Subject) -> None:
    """foreach=True, fused=True is a RuntimeError in torch."""
    assert_refused(RuntimeError, lambda: subject.make(named(), foreach=True, fused=True))


@check(applies=_plain)
def fused_and_differentiable_exclude_each_other(subject: Subject) -> None:
    """fused=True, differentiable=True is a RuntimeError in torch."""
    assert_refused(RuntimeError, lambda: subject.make(named(), fused=True, differentiable=True))


@check(applies=_plain)
def foreach_and_differentiable_exclude_each_other(subject: Subject) -> None:
    """foreach=True, differentiable=True is an AssertionError at torch's first step, not a graph cut in silence."""
    pairs = named()

    def build_and_step() -> None:
        optimizer = subject.make(pairs, foreach=True, differentiable=True)
        give_gradients(tensors(pairs), 0)
        with torch.no_grad():
            optimizer.step()

    assert_refused((AssertionError, RuntimeError), build_and_step, tensors(pairs))


@check(applies=_plain)
def foreach_takes_no_tensor_learning_rate(subject: Subject) -> None:
    """foreach=True with a Tensor lr needs capturable=True; torch raises ValueError when it is built."""
    assert_refused(ValueError, lambda: subject.make(named(), foreach=True, lr=torch.tensor(LR)))


@check(applies=_plain)
def foreach_takes_no_tensor_learning_rate_later(subject: Subject) -> None:
    """A Tensor lr put into a foreach=True group afterwards is a RuntimeError at the step, before anything moves."""
    optimizer, pairs = trained(subject, foreach=True)
    set_all(optimizer, lr=torch.tensor(LR))
    give_gradients(tensors(pairs), 3)
    assert_refused((RuntimeError, ValueError), optimizer.step, tensors(pairs))


@check(applies=_plain)
def foreach_takes_no_tensor_betas(subject: Subject) -> None:
    """foreach=True with Tensor betas needs capturable=True; torch raises ValueError when it is built."""
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    assert_refused(ValueError, lambda: subject.make(named(), foreach=True, betas=betas))


@check
def betas_are_both_numbers_or_both_tensors(subject: Subject) -> None:
    """One float and one Tensor is a ValueError in torch."""
    assert_refused(ValueError, lambda: subject.make(named(), betas=(0.9, torch.tensor(0.99))))
    assert_refused(ValueError, lambda: subject.make(named(), betas=(torch.tensor(0.9), 0.99)))


@check
def betas_of_two_numbers_each_are_refused(subject: Subject) -> None:
    """A Tensor beta must be one number."""
    wrong = (torch.tensor([0.9, 0.8]), torch.tensor([0.99, 0.98]))
    assert_refused((ValueError, RuntimeError), lambda: subject.make(named(), betas=wrong))


@check(applies=lambda subject: subject.engine != "fused")
def capturable_is_for_devices_that_capture(subject: Subject) -> None:
    """capturable=True on CPU is an AssertionError at the step, before weights move."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR, capturable=True)
    give_gradients(tensors(pairs), 0)
    assert_refused(AssertionError, optimizer.step, tensors(pairs))


@check(applies=lambda subject: subject.engine == "fused")
def capturable_changes_nothing_when_fused(subject: Subject) -> None:
    """fused=True, capturable=True is what many configs say; on CPU it trains as fused=True does."""
    assert_same(tensors(trained(subject, capturable=True)[1]), tensors(trained(subject)[1]))


@check(applies=_plain)
def engines_agree(subject: Subject) -> None:
    """A run may be continued with another engine: all give the same numbers to rounding."""
    runs = [
        tensors(trained(subject, 5, weight_decay=0.1, **options)[1])
        for options in ({}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False})
    ]
    for run in runs[1:]:
        assert_close(runs[0], run)


@check(applies=_plain)
def engines_can_be_changed_in_mid_training(subject: Subject) -> None:
    """A checkpoint written under one engine continues under another, and so does a group whose flags are changed."""
    _, expected = trained(subject, 6)
    for flags in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        optimizer, pairs = trained(subject)
        target = subject.make(others := [(n, nn.Parameter(p.detach().clone())) for n, p in pairs], lr=LR, **flags)
        target.load_state_dict(optimizer.state_dict())
        random_steps(target, tensors(others), 3, start=3)
        assert_close(tensors(others), tensors(expected))
        optimizer, pairs = trained(subject)
        set_all(optimizer, **flags)
        random_steps(optimizer, tensors(pairs), 3, start=3)
        assert_close(tensors(pairs), tensors(expected))


@check(applies=lambda subject: subject.engine == "fused")
def fused_refuses_what_it_cannot_do(subject: Subject) -> None:
    """fused=True on a device or dtype without such a kernel is a RuntimeError, not a silent other engine."""
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = subject.make(pair(p), lr=LR)
    p.grad = torch.ones(3, 2, device="meta")
    assert_refused(RuntimeError, optimizer.step)


def _doubles(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()


@check(applies=_plain)
def differentiable_through_the_gradient_and_the_weights(subject: Subject) -> None:
    """differentiable=True: d(new weights)/d(weights, gradient) is right, over two steps with decay."""

    def act(p: Tensor, g: Tensor) -> Tensor:
        p = p.clone()
        optimizer = subject.make([("up_proj.weight", p)], lr=0.1, weight_decay=0.3, differentiable=True)
        for size in (1.0, 2.0):
            p.grad = size * g
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(act, (_doubles(3, 2), _doubles(3, 2, seed=1)))


@check(applies=_plain)
def differentiable_through_the_state(subject: Subject) -> None:
    """differentiable=True: gradients reach the moments that a step started from."""
    probe = subject.make([("up_proj.weight", p := _doubles(3, 2).detach().requires_grad_())])
    p.grad = torch.ones_like(p)
    probe.step()
    shapes = {name: x.shape for name, x in probe.state[p].items() if name.startswith("exp_avg_sq")}

    def act(m: Tensor, v: Tensor) -> Tensor:
        p = _doubles(3, 2).detach().clone().requires_grad_().clone()
        optimizer = subject.make([("up_proj.weight", p)], lr=0.1, differentiable=True)
        p.grad = _doubles(3, 2, seed=1).detach()
        second = {name: v.expand(shape).clone() for name, shape in shapes.items()}
        optimizer.state[p].update(step=torch.tensor(4.0), exp_avg=m.clone(), **second)
        optimizer.step()
        return p

    assert torch.autograd.gradcheck(act, (_doubles(3, 2, seed=2), _doubles(1, seed=3)))


@check(applies=_plain)
def differentiable_through_the_learning_rate(subject: Subject) -> None:
    """Learned learning rates: the loss after two steps has the right derivative by a Tensor lr."""

    def act(lr: Tensor) -> Tensor:
        p = _doubles(3, 2).detach().requires_grad_().clone()
        optimizer = subject.make([("up_proj.weight", p)], lr=lr, weight_decay=0.3, differentiable=True)
        for seed in (1, 2):
            p.grad = _doubles(3, 2, seed=seed).detach()
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(act, (torch.tensor(0.1, dtype=torch.float64, requires_grad=True),))


@check(applies=_plain)
def differentiable_through_the_betas(subject: Subject) -> None:
    """Learned betas, as Tensors."""

    def act(beta1: Tensor, beta2: Tensor) -> Tensor:
        p = _doubles(3, 2).detach().requires_grad_().clone()
        optimizer = subject.make([("up_proj.weight", p)], lr=0.1, betas=(beta1, beta2), differentiable=True)
        for seed in (1, 2):
            p.grad = _doubles(3, 2, seed=seed).detach()
            optimizer.step()
        return p

    betas = tuple(torch.tensor(beta, dtype=torch.float64, requires_grad=True) for beta in (0.6, 0.7))
    assert torch.autograd.gradcheck(act, betas)


@check(applies=_plain)
def differentiable_steps_are_the_plain_steps(subject: Subject) -> None:
    """differentiable=True changes what autograd sees, not the numbers."""
    pairs = named(dtype=torch.float64)
    others = [(name, p.detach().clone().requires_grad_().clone()) for name, p in named(dtype=torch.float64)]
    plain = subject.make(pairs, lr=LR, weight_decay=0.1)
    optimizer = subject.make(others, lr=LR, weight_decay=0.1, differentiable=True)
    for step in range(3):
        give_gradients(tensors(pairs), step)
        give_gradients([p for _, p in others], step)
        plain.step()
        optimizer.step()
    assert_close(tensors(pairs), [p for _, p in others])  # torch's own bias corrections are of float32 here
    assert all(p.grad_fn is not None for _, p in others)


@check
def what_is_not_differentiable_leaves_no_graph(subject: Subject) -> None:
    """Gradients that carry a graph (create_graph=True) do not make weights or moments carry one."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR)
    before = values([p])
    for _ in range(2):
        (p**3).sum().backward(create_graph=True)
        optimizer.step()
        assert p.is_leaf and not any(getattr(t, "requires_grad", False) for t in optimizer.state[p].values())
        p.grad = None
    assert_moved([p], before)


@check(applies=_plain)
def maximize_with_every_engine(subject: Subject) -> None:
    """maximize=True goes up with every engine."""
    for flags in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        p = one()
        optimizer = subject.make(pair(p), lr=LR, maximize=True, **flags)
        before = values([p])
        (sign,) = give_signs([p])
        optimizer.step()
        assert_close([p], [before[0] + LR * sign])
