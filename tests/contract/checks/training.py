"""What training loops put around a step: gradient scaling, clipping, averaging."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.contract.harness import (
    LR,
    Named,
    assert_close,
    assert_moved,
    assert_same,
    check,
    give_gradients,
    give_signs,
    named,
    one,
    pair,
    state_of,
    tensors,
    trained,
    values,
)
from tests.contract.subjects import Subject


def _loss(params: list[nn.Parameter], step: int) -> torch.Tensor:
    """Its gradients are those of ``give_gradients``."""
    generator = torch.Generator().manual_seed(1000 + step)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
    return sum((p * d).sum() for p, d in zip(params, directions, strict=True))  # type: ignore[return-value]


def _scaler(scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def _fused(subject: Subject) -> bool:
    return subject.engine == "fused"


@check
def scaled_losses_train_alike(subject: Subject) -> None:
    """GradScaler: the loss scaled by a power of two gives the weights that the plain loss gives."""
    pairs, scaler = named(), _scaler()
    optimizer = subject.make(pairs, lr=LR)
    for step in range(3):
        scaler.scale(_loss(tensors(pairs), step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_close(tensors(pairs), tensors(trained(subject)[1]))


@check
def scaled_gradients_can_be_unscaled_and_clipped(subject: Subject) -> None:
    """GradScaler.unscale_, clip_grad_norm_, scaler.step: the gradients are not unscaled a second time."""
    pairs, others, scaler = named(), named(), _scaler()
    optimizer, plain = subject.make(pairs, lr=LR, eps=0.1), subject.make(others, lr=LR, eps=0.1)
    for step in range(3):
        scaler.scale(_loss(tensors(pairs), step)).backward()
        scaler.unscale_(optimizer)
        _loss(tensors(others), step).backward()
        norms = [nn.utils.clip_grad_norm_(tensors(some), 0.5) for some in (pairs, others)]
        assert_close(norms[:1], norms[1:])
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    assert_close(tensors(pairs), tensors(others))
    assert_moved(tensors(pairs), tensors(named()))


@check
def an_overflow_skips_the_step(subject: Subject) -> None:
    """GradScaler: one inf among the gradients, and weights, moments and counters stay; the scale is halved."""
    optimizer, pairs = trained(subject, weight_decay=0.5)
    scaler = _scaler()
    before, state = values(tensors(pairs)), state_of(optimizer, tensors(pairs))
    scaler.scale(_loss(tensors(pairs), 7)).backward()
    pairs[0][1].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(tensors(pairs), before)
    assert_same(state_of(optimizer, tensors(pairs)), state)
    assert scaler.get_scale() == 2.0**9


@check
def an_overflow_in_the_first_step_leaves_it_the_first(subject: Subject) -> None:
    """GradScaler starts with too large a scale as a rule: the step after the skipped one has t = 1."""
    p, scaler = one(), _scaler()
    optimizer = subject.make(pair(p), lr=LR)
    before = values([p])
    for size in (torch.inf, 1.0):
        scaler.scale(torch.ones(()))  # makes the scale
        (sign,) = give_signs([p], size * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert_close([p], [before[0] - LR * sign])
    assert float(optimizer.state[p]["step"]) == 1


@check(applies=_fused)
def a_fused_step_takes_the_scale_itself(subject: Subject) -> None:
    """fused=True tells GradScaler so, and divides by optimizer.grad_scale: no separate pass over the gradients."""
    pairs, others = named(), named()
    optimizer, plain = subject.make(pairs, lr=LR), subject.make(others, lr=LR)
    assert getattr(optimizer, "_step_supports_amp_scaling", False)
    for step in range(3):
        give_gradients(tensors(pairs), step)
        give_gradients(tensors(others), step)
        for p in tensors(pairs):
            p.grad *= 8
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        plain.step()
    assert_close(tensors(pairs), tensors(others))


@check(applies=_fused)
def a_fused_step_looks_for_overflow_itself(subject: Subject) -> None:
    """found_inf = 1 skips the step, counters included, and found_inf = 0 does not."""
    optimizer, pairs = trained(subject)
    before = values(tensors(pairs))
    give_gradients(tensors(pairs), 5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert_same(tensors(pairs), before)
    assert all(float(optimizer.state[p]["step"]) == 3 for p in tensors(pairs))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert_moved(tensors(pairs), before)


@check(applies=lambda subject: not _fused(subject))
def an_unfused_step_leaves_the_scale_to_the_scaler(subject: Subject) -> None:
    """Without fused=True GradScaler unscales and looks for inf as ever; who else claims it must do it."""
    assert not getattr(subject.make(named()), "_step_supports_amp_scaling", False)


@check
def a_fused_group_option_survives_loading(subject: Subject) -> None:
    """Loaded into an optimizer with the same flags, a checkpoint leaves GradScaler's two ways as they were."""
    optimizer, _ = trained(subject)
    target = subject.make(named())
    before = getattr(target, "_step_supports_amp_scaling", False)
    target.load_state_dict(optimizer.state_dict())
    assert getattr(target, "_step_supports_amp_scaling", False) == before
    assert [g.get("fused") for g in target.param_groups] == [g.get("fused") for g in optimizer.param_groups]


def _clipped(subject: Subject, clip: Any, by_hand: Any) -> None:
    pairs, others = named(), named()
    optimizer, plain = subject.make(pairs, lr=LR, eps=0.1), subject.make(others, lr=LR, eps=0.1)
    for step in range(2):
        for some in (pairs, others):
            give_gradients(tensors(some), step)
        clip(tensors(pairs))
        by_hand(others)
        optimizer.step()
        plain.step()
    assert_close(tensors(pairs), tensors(others), 1e-5)


@check
def gradients_clipped_by_norm_are_used(subject: Subject) -> None:
    """clip_grad_norm_ before the step, the standard recipe of language models."""

    def by_hand(pairs: Named) -> None:
        norm = sum((p.grad * p.grad).sum() for p in tensors(pairs)) ** 0.5
        for p in tensors(pairs):
            p.grad = p.grad * (0.5 / norm)

    _clipped(subject, lambda params: nn.utils.clip_grad_norm_(params, 0.5), by_hand)


@check
def gradients_clipped_by_value_are_used(subject: Subject) -> None:
    """clip_grad_value_ before the step."""

    def by_hand(pairs: Named) -> None:
        for p in tensors(pairs):
            p.grad = torch.where(p.grad.abs() > 0.25, 0.25 * p.grad.sign(), p.grad)

    _clipped(subject, lambda params: nn.utils.clip_grad_value_(params, 0.25), by_hand)


@check
def averaged_models_follow(subject: Subject) -> None:
    """AveragedModel with an exponential average sees every step's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = subject.make(model.named_parameters(), lr=LR)
    expected: list[torch.Tensor] = []
    for step in range(3):
        give_gradients(list(model.parameters()), step)
        optimizer.step()
        average.update_parameters(model)
        now = values(model.parameters())
        expected = [0.5 * e + 0.5 * p for e, p in zip(expected, now, strict=True)] if expected else now
    assert_close(average.module.parameters(), expected)
    assert_moved(average.module.parameters(), model.parameters())


@check
def accumulated_gradients_are_their_sum(subject: Subject) -> None:
    """Two backward passes before one step are the step of the sum, with zero_grad of either kind between."""
    for to_none in (True, False):
        pairs, others = named(), named()
        optimizer, plain = subject.make(pairs, lr=LR), subject.make(others, lr=LR)
        for step in range(3):
            _loss(tensors(pairs), step).backward()
            _loss(tensors(pairs), step + 9).backward()
            (_loss(tensors(others), step) + _loss(tensors(others), step + 9)).backward()
            optimizer.step()
            plain.step()
            optimizer.zero_grad(set_to_none=to_none)
            plain.zero_grad()
        assert_close(tensors(pairs), tensors(others))
