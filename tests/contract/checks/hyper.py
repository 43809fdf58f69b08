"""Hyper-parameters: numbers and tensors, fixed and changing, and what a step does with them."""

from __future__ import annotations

import math

import torch

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
    state_of,
    tensors,
    trained,
    values,
)
from tests.contract.subjects import Subject


@check
def the_first_step_is_the_learning_rate(subject: Subject) -> None:
    """Where |g| is the same everywhere, m/sqrt(v) is the sign: every weight moves by exactly lr, on every step."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR)
    for step in range(1, 4):
        signs = give_signs(tensors(pairs), 0.25)
        optimizer.step()
        assert_close(tensors(pairs), [p - step * LR * s for p, s in zip(tensors(named()), signs, strict=True)])


@check
def decay_is_decoupled(subject: Subject) -> None:
    """With no gradient a weight shrinks by lr * weight_decay, and no moment hears of it."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR, weight_decay=0.5)
    before = values([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close([p], [before[0] * (1 - LR * 0.5)])
    assert not any(t.any() for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and t.dim())


@check
def maximize_mirrors_minimize(subject: Subject) -> None:
    """maximize=True ascends: with the gradient's sign turned it is the same step, bit by bit."""
    ups, downs = named(), named()
    up, down = subject.make(ups, lr=LR, maximize=True), subject.make(downs, lr=LR)
    for step in range(3):
        give_gradients(tensors(ups), step)
        give_gradients(tensors(downs), step)
        for p in tensors(ups):
            p.grad = -p.grad
        up.step()
        down.step()
    assert_close(tensors(ups), tensors(downs))
    assert_moved(tensors(ups), tensors(named()))


@check
def eps_is_outside_the_root(subject: Subject) -> None:
    """A tiny gradient moves by lr * g / (|g| + eps), as in AdamW."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR, eps=1e-3)
    before = values([p])
    (sign,) = give_signs([p], 1e-3)
    optimizer.step()
    assert_close([p], [before[0] - LR / 2 * sign])


@check
def no_learning_rate_no_movement(subject: Subject) -> None:
    """A warm-up that starts at lr=0 leaves weights alone, decay or not, while moments and counters advance."""
    pairs = named()
    optimizer = subject.make(pairs, lr=0.0, weight_decay=0.5)
    random_steps(optimizer, tensors(pairs))
    assert_same(tensors(pairs), tensors(named()))
    assert all(float(optimizer.state[p]["step"]) == 3 for p in tensors(pairs))
    assert all(value.any() for value in state_of(optimizer, tensors(pairs)))


def _refused(subject: Subject, **options: object) -> None:
    assert_refused(ValueError, lambda: subject.make(named(), **options))


@check
def a_bad_learning_rate_is_refused(subject: Subject) -> None:
    """lr=-1 ascends and lr=nan destroys; both are ValueErrors at once."""
    _refused(subject, lr=-1.0)
    _refused(subject, lr=math.nan)


@check
def bad_betas_are_refused(subject: Subject) -> None:
    """betas outside [0, 1) diverge or divide by zero."""
    for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (0.9, math.nan)):
        _refused(subject, betas=betas)


@check
def a_bad_eps_is_refused(subject: Subject) -> None:
    """eps < 0 can make the denominator zero or negative."""
    _refused(subject, eps=-1e-8)
    _refused(subject, eps=math.nan)


@check
def a_bad_decay_is_refused(subject: Subject) -> None:
    """weight_decay < 0 makes weights grow."""
    _refused(subject, weight_decay=-0.1)
    _refused(subject, weight_decay=math.nan)


@check
def a_learning_rate_of_two_numbers_is_refused(subject: Subject) -> None:
    """A tensor lr must be one number."""
    assert_refused((ValueError, RuntimeError), lambda: subject.make(named(), lr=torch.tensor([0.1, 0.2])))


@check
def a_learning_rate_set_between_steps_is_followed(subject: Subject) -> None:
    """Schedules by hand write group["lr"]."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR)
    start, moved = values([p])[0], 0.0
    for rate in (LR, LR / 2, LR * 3):
        set_all(optimizer, lr=rate)
        (sign,) = give_signs([p])
        optimizer.step()
        moved += rate
        assert_close([p], [start - moved * sign])


def _tensor_rates(subject: Subject) -> bool:
    """torch refuses a tensor lr with foreach=True; that refusal is a check of its own."""
    return subject.engine != "foreach"


@check(applies=_tensor_rates)
def a_tensor_learning_rate_is_a_number(subject: Subject) -> None:
    """lr=torch.tensor(0.01) trains as lr=0.01 does."""
    _, pairs = trained(subject, lr=LR, weight_decay=0.5)
    _, others = trained(subject, lr=torch.tensor(LR), weight_decay=0.5)
    assert_close(tensors(pairs), tensors(others))
    assert_moved(tensors(others), tensors(named()))


@check(applies=_tensor_rates)
def a_tensor_learning_rate_may_have_one_element(subject: Subject) -> None:
    """lr=torch.tensor([0.01]) is one number, too."""
    _, pairs = trained(subject, lr=LR)
    _, others = trained(subject, lr=torch.tensor([LR]))
    assert_close(tensors(pairs), tensors(others))


@check(applies=_tensor_rates)
def a_tensor_learning_rate_changed_in_place_is_followed(subject: Subject) -> None:
    """CUDA graphs and compiled steps change lr with fill_, and the next step must see it."""
    p, lr = one(), torch.tensor(LR)
    optimizer = subject.make(pair(p), lr=lr)
    start, moved = values([p])[0], 0.0
    for rate in (LR, LR / 2, LR * 4):
        lr.fill_(rate)
        (sign,) = give_signs([p])
        optimizer.step()
        moved += rate
        assert_close([p], [start - moved * sign])


@check(applies=_tensor_rates)
def a_tensor_learning_rate_stays_the_callers(subject: Subject) -> None:
    """A step neither replaces the tensor in the group nor writes to it."""
    lr = torch.tensor(LR)
    optimizer, _ = trained(subject, lr=lr)
    assert all(group["lr"] is lr for group in optimizer.param_groups) and lr.item() == LR and lr._version == 0


def _tensor_betas(subject: Subject) -> bool:
    return subject.engine != "foreach"


@check(applies=_tensor_betas)
def tensor_betas_are_numbers(subject: Subject) -> None:
    """betas=(torch.tensor(0.9), torch.tensor(0.95)) trains as the numbers do."""
    _, pairs = trained(subject, betas=(0.875, 0.9375))
    _, others = trained(subject, betas=(torch.tensor(0.875), torch.tensor(0.9375)))
    assert_close(tensors(pairs), tensors(others), 1e-5)
    assert_moved(tensors(others), tensors(named()))


@check(applies=_tensor_betas)
def tensor_betas_may_have_one_element(subject: Subject) -> None:
    """betas as tensors of shape [1] are taken as numbers, in float64 too."""
    _, pairs = trained(subject, betas=(0.875, 0.9375))
    betas = (torch.tensor([0.875], dtype=torch.float64), torch.tensor([0.9375], dtype=torch.float64))
    _, others = trained(subject, betas=betas)
    assert_close(tensors(pairs), tensors(others), 1e-5)


@check(applies=_tensor_betas)
def tensor_betas_changed_in_place_are_followed(subject: Subject) -> None:
    """A schedule that fills the beta tensors is as good as one that writes numbers."""
    betas = (torch.tensor(0.875), torch.tensor(0.9375))
    by_tensor, pairs = trained(subject, betas=betas)
    by_number, others = trained(subject, betas=(0.875, 0.9375))
    betas[0].fill_(0.5)
    betas[1].fill_(0.75)
    set_all(by_number, betas=(0.5, 0.75))
    random_steps(by_tensor, tensors(pairs), 2, start=3)
    random_steps(by_number, tensors(others), 2, start=3)
    assert_close(tensors(pairs), tensors(others), 1e-5)


@check
def betas_set_between_steps_are_followed(subject: Subject) -> None:
    """OneCycleLR and schedules by hand write group["betas"]; the next step is one with those betas."""
    changed, pairs = trained(subject, 1, betas=(0.5, 0.75))
    other, others = trained(subject, 1, betas=(0.25, 0.75))
    set_all(changed, betas=(0.25, 0.75))
    assert_close(tensors(pairs), tensors(others))  # first steps do not depend on betas
    random_steps(changed, tensors(pairs), 1, start=1)
    random_steps(other, tensors(others), 1, start=1)
    # m after two steps: 0.25 * (1 - beta) g0 + 0.75 g1 with the first step's beta, corrected by 1 - 0.25 ** 2
    m0 = changed.state[pairs[0][1]]["exp_avg"] - other.state[others[0][1]]["exp_avg"]
    give_gradients(tensors(pairs), 0)
    assert_close([m0], [0.25 * (0.5 - 0.75) * pairs[0][1].grad], 1e-5)


@check(applies=lambda subject: subject.elementwise)
def is_adamw_where_every_element_is_a_block(subject: Subject) -> None:
    """Under elementwise rules the numbers of AdamW come out, fifty steps on."""
    pairs, others = named(), named()
    random_steps(subject.make(pairs, lr=LR, weight_decay=0.1), tensors(pairs), 50)
    random_steps(torch.optim.AdamW(others, lr=LR, weight_decay=0.1, foreach=False), tensors(others), 50)
    assert_close(tensors(pairs), tensors(others), 1e-5)
