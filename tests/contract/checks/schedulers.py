"""Learning-rate schedulers: what they write is what the next step uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler as schedules

from tests.contract.harness import LR, assert_close, check, give_signs, one, pair, values
from tests.contract.subjects import Subject


def follows(subject: Subject, make: Callable[[Any], Any], steps: int = 8, **options: Any) -> None:
    """Rates are AdamW's under the same schedule, and each step moves the weights by its rate."""
    p, q = one(), one()
    optimizer = subject.make(pair(p), lr=LR, **options)
    reference = torch.optim.AdamW([q], lr=LR, foreach=False)
    schedule, expected = make(optimizer), make(reference)
    seen = set()
    for step in range(steps):
        rate = float(reference.param_groups[0]["lr"])
        (sign,) = give_signs([p])
        give_signs([q])
        before = values([p])[0]
        optimizer.step()
        reference.step()
        assert_close([p], [before - rate * sign])
        for s in (schedule, expected):
            s.step(1.0 + step) if isinstance(s, schedules.ReduceLROnPlateau) else s.step()
        (group,) = optimizer.param_groups
        assert float(group["lr"]) == float(reference.param_groups[0]["lr"])
        seen.add(rate)
    assert len(seen) > 1, "the schedule never changed the rate"


@check
def follows_lambda_lr(subject: Subject) -> None:
    """Warm-up by LambdaLR, the schedule of transformers' get_*_schedule."""
    follows(subject, lambda o: schedules.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)))


@check
def follows_multiplicative_lr(subject: Subject) -> None:
    """MultiplicativeLR."""
    follows(subject, lambda o: schedules.MultiplicativeLR(o, lambda step: 0.75))


@check
def follows_step_lr(subject: Subject) -> None:
    """StepLR."""
    follows(subject, lambda o: schedules.StepLR(o, step_size=2, gamma=0.5))


@check
def follows_multi_step_lr(subject: Subject) -> None:
    """MultiStepLR."""
    follows(subject, lambda o: schedules.MultiStepLR(o, milestones=[2, 5], gamma=0.5))


@check
def follows_linear_lr(subject: Subject) -> None:
    """LinearLR."""
    follows(subject, lambda o: schedules.LinearLR(o, start_factor=0.25, total_iters=5))


@check
def follows_exponential_lr(subject: Subject) -> None:
    """ExponentialLR."""
    follows(subject, lambda o: schedules.ExponentialLR(o, gamma=0.75))


@check
def follows_polynomial_lr(subject: Subject) -> None:
    """PolynomialLR."""
    follows(subject, lambda o: schedules.PolynomialLR(o, total_iters=10, power=2.0))


@check
def follows_cosine_annealing(subject: Subject) -> None:
    """CosineAnnealingLR."""
    follows(subject, lambda o: schedules.CosineAnnealingLR(o, T_max=6))


@check
def follows_cosine_annealing_with_restarts(subject: Subject) -> None:
    """CosineAnnealingWarmRestarts."""
    follows(subject, lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=3))


@check
def follows_one_cycle(subject: Subject) -> None:
    """OneCycleLR cycles beta1 as well, and refuses optimizers whose groups have no betas."""
    p, q = one(), one()
    optimizer, reference = subject.make(pair(p), lr=LR), subject.make(pair(q), lr=LR)
    schedule = schedules.OneCycleLR(optimizer, max_lr=LR, total_steps=10)
    seen = set()
    for _ in range(9):
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            other["lr"], other["betas"] = group["lr"], tuple(group["betas"])  # by hand
        seen.add(float(optimizer.param_groups[0]["betas"][0]))
        for parameter, o in ((p, optimizer), (q, reference)):
            give_signs([parameter])
            o.step()
        assert_close([p], [q])
        schedule.step()
    assert min(seen) < 0.9 < max(seen)


@check
def follows_cyclic_lr(subject: Subject) -> None:
    """CyclicLR cycles beta1 as well where cycle_momentum is on."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR)
    schedule = schedules.CyclicLR(optimizer, base_lr=LR / 4, max_lr=LR, step_size_up=2, cycle_momentum=True)
    betas = set()
    for _ in range(5):
        betas.add(float(optimizer.param_groups[0]["betas"][0]))
        give_signs([p])
        optimizer.step()
        schedule.step()
    assert min(betas) < 0.85 < max(betas)
    follows(subject, lambda o: schedules.CyclicLR(o, base_lr=LR / 4, max_lr=LR, step_size_up=2, cycle_momentum=False))


@check
def follows_reduce_on_plateau(subject: Subject) -> None:
    """ReduceLROnPlateau."""
    follows(subject, lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=1))


@check
def follows_sequential_lr(subject: Subject) -> None:
    """SequentialLR: warm-up, then decay."""

    def make(o: Any) -> Any:
        warm, cool = schedules.LinearLR(o, 0.25, total_iters=3), schedules.ExponentialLR(o, 0.75)
        return schedules.SequentialLR(o, [warm, cool], milestones=[3])

    follows(subject, make)


@check
def follows_chained_schedulers(subject: Subject) -> None:
    """ChainedScheduler."""
    follows(subject, lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, total_iters=3), schedules.ExponentialLR(o, 0.875)], optimizer=o
    ))  # fmt: skip


@check
def follows_swa_lr(subject: Subject) -> None:
    """SWALR, of stochastic weight averaging."""
    follows(subject, lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=LR / 4, anneal_epochs=3))


@check(applies=lambda subject: subject.engine != "foreach")
def schedulers_fill_a_tensor_learning_rate(subject: Subject) -> None:
    """Schedulers write into a tensor lr instead of replacing it: a captured or compiled step keeps seeing it."""
    p, lr = one(), torch.tensor(LR)
    optimizer = subject.make(pair(p), lr=lr)
    schedule = schedules.ExponentialLR(optimizer, gamma=0.5)
    start, moved = values([p])[0], 0.0
    for step in range(4):
        (sign,) = give_signs([p])
        optimizer.step()
        schedule.step()
        moved += LR * 0.5**step
        assert_close([p], [start - moved * sign])
    assert optimizer.param_groups[0]["lr"] is lr


@check
def schedulers_resume(subject: Subject) -> None:
    """Optimizer and scheduler loaded from a checkpoint go on with the saved rate."""

    def build() -> tuple[Any, Any, Any]:
        p = one()
        optimizer = subject.make(pair(p), lr=LR)
        return p, optimizer, schedules.CosineAnnealingLR(optimizer, T_max=6)

    p, optimizer, schedule = build()
    for _ in range(3):
        give_signs([p])
        optimizer.step()
        schedule.step()
    _, again, resumed = build()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    schedule.step()
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != LR
