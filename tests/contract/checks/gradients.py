"""Gradients and parameters as they come: absent, late, strided, empty, in several dtypes, and of kinds to refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

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
    ours,
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
def two_runs_are_the_same_run(subject: Subject) -> None:
    """The same seed gives the same weights and states, bit by bit."""
    first, pairs = trained(subject, 5, weight_decay=0.1)
    second, others = trained(subject, 5, weight_decay=0.1)
    assert_same(tensors(pairs), tensors(others))
    assert_same(state_of(first, tensors(pairs)), state_of(second, tensors(others)))
    assert_moved(tensors(pairs), tensors(named()))


@check
def a_step_is_in_place(subject: Subject) -> None:
    """The parameter stays the same leaf at the same address: models, DDP buckets and CUDA graphs hold on to it."""
    pairs = named()
    at = [p.data_ptr() for p in tensors(pairs)]
    random_steps(subject.make(pairs, lr=LR), tensors(pairs))
    assert [p.data_ptr() for p in tensors(pairs)] == at
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in tensors(pairs))


@check
def autograd_notices_the_step(subject: Subject) -> None:
    """A graph built before the step must not be differentiated with the weights after it; autograd says so."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR)
    for _ in range(2):
        product = (p * p).sum()
        give_signs([p])
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@check
def gradients_are_not_touched(subject: Subject) -> None:
    """Gradients are logged, accumulated and clipped after the step, too: same bits, same version."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR, weight_decay=0.5)
    set_all(optimizer, maximize=True)
    for step in range(2):
        give_gradients(tensors(pairs), step)
        grads = [p.grad for p in tensors(pairs)]
        before, versions = values(grads), [g._version for g in grads]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(tensors(pairs), grads, strict=True))
        assert_same(grads, before)
        assert [g._version for g in grads] == versions


@check
def a_parameter_without_a_gradient_waits(subject: Subject) -> None:
    """An unused branch keeps its weights, decay or not, and its moments and counter."""
    optimizer, pairs = trained(subject, 2, weight_decay=0.5)
    (_, idle), *rest = pairs
    before, state = values([idle]), state_of(optimizer, [idle])
    give_gradients(tensors(rest), 9)
    optimizer.step()
    assert_same([idle], before)
    assert_same(state_of(optimizer, [idle]), state)
    assert float(optimizer.state[rest[0][1]]["step"]) == 3


@check
def a_late_gradient_starts_at_step_one(subject: Subject) -> None:
    """A layer that joins later has its own bias correction: its first step is lr long."""
    pairs = named()
    (_, late), *rest = pairs
    optimizer = subject.make(pairs, lr=LR)
    random_steps(optimizer, tensors(rest), 3)
    before = values([late])
    signs = give_signs(tensors(pairs))
    optimizer.step()
    assert_close([late], [before[0] - LR * signs[0]])
    assert float(optimizer.state[late]["step"]) == 1 and float(optimizer.state[rest[0][1]]["step"]) == 4


@check
def a_step_without_any_gradient_does_nothing(subject: Subject) -> None:
    """step() before the first backward is allowed and moves nothing."""
    pairs = named()
    subject.make(pairs, weight_decay=0.5).step()
    assert_same(tensors(pairs), tensors(named()))


@check
def thawing_a_parameter_is_enough(subject: Subject) -> None:
    """requires_grad turned on in mid-training: the parameter was in the list, so it trains from now on."""
    p, q = one(seed=1), one(seed=2).requires_grad_(False)
    optimizer = subject.make([{"params": [p, q]}], lr=LR)
    for thawed in (False, True):
        q.requires_grad_(thawed)
        before = values([p, q])
        ((p * p).sum() + (q * q).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_moved([p], before[:1])
        assert torch.equal(q, before[1]) is not thawed


@check
def freezing_a_parameter_is_enough(subject: Subject) -> None:
    """requires_grad turned off in mid-training: no gradient, no movement, not even decay."""
    p, q = one(seed=1), one(seed=2)
    optimizer = subject.make([("a.weight", p), ("b.weight", q)], lr=LR, weight_decay=0.5)
    random_steps(optimizer, [p, q])
    q.requires_grad_(False)
    before = values([p, q])
    ((p * p).sum() + (q * q).sum()).backward()
    optimizer.step()
    assert_moved([p], before[:1])
    assert_same([q], before[1:])


@check
def zero_grad_forgets(subject: Subject) -> None:
    """zero_grad() sets gradients to None and frees them."""
    pairs = named()
    optimizer = subject.make(pairs)
    give_gradients(tensors(pairs), 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in tensors(pairs))


@check
def zero_grad_can_keep_the_tensors(subject: Subject) -> None:
    """zero_grad(set_to_none=False) zeroes in place: gradient buckets stay where they are."""
    pairs = named()
    optimizer = subject.make(pairs)
    give_gradients(tensors(pairs), 0)
    grads = [p.grad for p in tensors(pairs)]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(tensors(pairs), grads, strict=True))


@check
def empty_parameters_pass(subject: Subject) -> None:
    """Shards and experts without rows have zero elements."""
    p, q = nn.Parameter(torch.ones(0, 3)), one()
    optimizer = subject.make([("empty.weight", p), ("full.weight", q)], lr=LR)
    before = values([q])
    for _ in range(2):
        p.grad = torch.zeros(0, 3)
        (sign,) = give_signs([q])
        optimizer.step()
    assert_close([q], [before[0] - 2 * LR * sign])


@check
def scalars_train(subject: Subject) -> None:
    """Temperatures and gates are 0-dim parameters."""
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = subject.make([("scale", p)], lr=LR)
    for _ in range(2):
        p.grad = torch.tensor(3.0)
        optimizer.step()
    assert_close([p], [torch.tensor(1.0 - 2 * LR)])


@check
def dtypes_mix_in_one_group(subject: Subject) -> None:
    """fp32 norms beside bf16 weights in one group: each is stepped in its own dtype."""
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    pairs = [(f"layers.{i}.weight", one(seed=i, dtype=kind)) for i, kind in enumerate(kinds)]
    optimizer = subject.make([{"params": pairs}], lr=LR)
    before = values(tensors(pairs))
    for _ in range(2):
        signs = give_signs(tensors(pairs))
        optimizer.step()
    assert [p.dtype for p in tensors(pairs)] == list(kinds)
    for p, q, s in zip(tensors(pairs), before, signs, strict=True):
        torch.testing.assert_close(p.detach(), q - 2 * LR * s, rtol=1e-2, atol=1e-6)


@check
def doubles_stay_doubles(subject: Subject) -> None:
    """In float64 the step is right to float64's rounding."""
    p = one(dtype=torch.float64)
    optimizer = subject.make(pair(p), lr=LR, eps=1e-8)
    before = values([p])
    (sign,) = give_signs([p], 0.3)
    optimizer.step()
    assert_close([p], [before[0] - LR * sign * 0.3 / (0.3 + 1e-8)], 1e-13)


@check
def half_precision_does_not_overflow(subject: Subject) -> None:
    """bf16 weights with gradients of any size the dtype holds keep finite weights."""
    p = one(dtype=torch.bfloat16)
    optimizer = subject.make(pair(p), lr=LR)
    for size in (1e4, 1.0, 1e-4):
        give_signs([p], size)
        optimizer.step()
        assert p.isfinite().all()


@check(applies=ours)
def squares_do_not_overflow(subject: Subject) -> None:
    """fp16 gradients of 6e4 have squares beyond fp16: with second moments in float32 the step is still lr long."""
    p = one(dtype=torch.float16)
    optimizer = subject.make(pair(p), lr=LR)
    before = values([p])
    (sign,) = give_signs([p], 6e4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before[0] - LR * sign, rtol=2e-3, atol=2e-3 * LR)


@check
def sparse_gradients_are_refused(subject: Subject) -> None:
    """nn.Embedding(sparse=True) does not fit; a RuntimeError comes before any weight of the group moves."""
    layer, table = one(), nn.Embedding(5, 3, sparse=True)
    optimizer = subject.make([{"params": [("a.weight", layer), ("b.weight", table.weight)]}], lr=LR)
    give_signs([layer])
    table(torch.tensor([1, 2])).sum().backward()
    assert_refused(RuntimeError, optimizer.step, [layer, table.weight])


@check
def complex_parameters_are_right_or_refused(subject: Subject) -> None:
    """A complex weight steps as its real and imaginary parts do, or a RuntimeError comes before anything moves."""
    real, p = one(), nn.Parameter(torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
    parts = nn.Parameter(torch.view_as_real(p.detach()).clone())
    optimizer = subject.make([{"params": [("a.weight", real), ("b.weight", p)]}], lr=LR)
    reference = subject.make(pair(parts), lr=LR)
    give_signs([real, parts])
    p.grad = torch.view_as_complex(parts.grad.clone())
    before = values([real, p])
    try:
        optimizer.step()
    except RuntimeError:
        assert_same([real, p], before)
    else:
        reference.step()
        assert_close([torch.view_as_real(p.detach())], [parts])


@check
def gradients_made_in_inference_mode_are_taken(subject: Subject) -> None:
    """Gradients assigned by hand may come from torch.inference_mode()."""
    p = one()
    optimizer = subject.make(pair(p), lr=LR)
    before = values([p])
    for _ in range(2):
        with torch.inference_mode():
            grad = torch.ones_like(p)
        p.grad = grad
        optimizer.step()
    assert_close([p], [before[0] - 2 * LR])


@check
def a_step_inside_no_grad_is_a_step(subject: Subject) -> None:
    """Custom loops wrap the step in no_grad or set_grad_enabled; the numbers are the same."""
    _, pairs = trained(subject)
    with torch.no_grad():
        _, others = trained(subject)
    with torch.enable_grad():
        _, more = trained(subject)
    assert_same(tensors(pairs), tensors(others))
    assert_same(tensors(pairs), tensors(more))


def _altered(subject: Subject, alter: Callable[[nn.Parameter], None]) -> None:
    """Right, or an error before the weights move: never wrong in silence. ``alter`` gives signs as gradients."""
    p = one((6, 4))
    optimizer = subject.make(pair(p), lr=LR, weight_decay=0.0)
    give_signs([p])
    optimizer.step()
    p.grad = None
    alter(p)
    before = values([p])
    try:
        optimizer.step()
    except (RuntimeError, ValueError, TypeError):
        assert_same([p], before)
    else:
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), before[0] - LR * p.grad.to(p.dtype), rtol=1e-2, atol=1e-6)


@check
def a_parameter_that_changed_shape_is_refused(subject: Subject) -> None:
    """A pruned layer's old moments do not fit; memory must not be read past its end."""
    p = one((6, 4))
    optimizer = subject.make(pair(p), lr=LR, weight_decay=0.0)
    give_signs([p])
    optimizer.step()
    p.grad = None
    p.data = p.data[:3, :2].clone()
    give_signs([p])
    assert_refused((RuntimeError, ValueError), optimizer.step, [p])


@check
def a_parameter_that_changed_device_is_refused(subject: Subject) -> None:
    """A weight moved elsewhere with its state left behind is an error, not a read of memory that is not there."""
    p, away = one(), nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = subject.make(pair(p), lr=LR)
    give_signs([p])
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = away
    optimizer.state[away] = optimizer.state.pop(p)
    away.grad = torch.empty(4, 3, device="meta")
    assert_refused((RuntimeError, ValueError, TypeError), optimizer.step)


@check
def a_parameter_that_changed_dtype_is_right_or_refused(subject: Subject) -> None:
    """model.bfloat16() after the first step changes weights under the optimizer."""

    def alter(p: nn.Parameter) -> None:
        p.data = p.data.bfloat16()
        give_signs([p])

    _altered(subject, alter)


@check
def a_gradient_of_another_dtype_is_right_or_refused(subject: Subject) -> None:
    """Since torch has grad_dtype, a float32 weight may have a bfloat16 gradient."""

    def alter(p: nn.Parameter) -> None:
        p.grad_dtype = None
        signs = give_signs([p])
        p.grad = signs[0].bfloat16()

    _altered(subject, alter)
