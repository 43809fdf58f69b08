"""Parameter groups: what is in them, and adding one later."""

from __future__ import annotations

import inspect

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
    pair,
    random_steps,
    set_all,
    tensors,
    values,
)
from tests.contract.subjects import Subject

DOCUMENTED = ("lr", "betas", "eps", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused")


@check
def every_documented_argument_is_in_the_defaults(subject: Subject) -> None:
    """Schedulers, checkpoints and zero_grad look options up in optimizer.defaults."""
    assert set(DOCUMENTED) <= subject.make(named()).defaults.keys()


@check
def every_documented_argument_is_in_every_group(subject: Subject) -> None:
    """A group tells all of its options, given or not, so that checkpoints carry them."""
    optimizer = subject.make([{"params": [one()]}, {"params": [one()], "lr": 0.5}])
    assert all(set(DOCUMENTED) <= group.keys() for group in optimizer.param_groups)


@check
def every_argument_can_be_given_by_keyword(subject: Subject) -> None:
    """Config files say foreach, fused, maximize, capturable and differentiable to whatever optimizer they name."""
    params = inspect.signature(type(subject.make(named()))).parameters
    wanted = DOCUMENTED if subject.arguments else DOCUMENTED[:4]
    assert set(wanted) <= params.keys()


@check
def groups_hold_what_was_given(subject: Subject) -> None:
    """lr, betas, eps and weight_decay are found again in the groups, under torch's names."""
    optimizer = subject.make(pair(one()), lr=0.5, betas=(0.75, 0.875), eps=0.25, weight_decay=0.125)
    (group,) = optimizer.param_groups
    assert [group[key] for key in ("lr", "eps", "weight_decay")] == [0.5, 0.25, 0.125]
    assert tuple(float(beta) for beta in group["betas"]) == (0.75, 0.875)


@check
def named_parameters_make_one_group(subject: Subject) -> None:
    """param_groups[0]["lr"] is read by every training loop's logger, and written by some."""
    if subject.arguments:  # the door keeps the published package's promise: no decay of norms and biases
        assert len(subject.make(named()).param_groups) == 1
    assert len(subject.make(named(shapes={"a.weight": (3, 4), "b.weight": (4, 3)})).param_groups) == 1


@check
def an_added_group_trains(subject: Subject) -> None:
    """Unfreezing a layer in mid-training adds a group that steps from then on."""
    pairs, late = named(), one((3, 5), seed=7)
    optimizer = subject.make(pairs, lr=LR)
    random_steps(optimizer, tensors(pairs))
    optimizer.add_param_group({"params": [("late.weight", late)]})
    before = values([*tensors(pairs), late])
    give_gradients([*tensors(pairs), late], 9)
    optimizer.step()
    assert_moved([*tensors(pairs), late], before)
    assert float(optimizer.state[late]["step"]) == 1 and float(optimizer.state[pairs[0][1]]["step"]) == 4


@check
def an_added_group_gets_the_defaults(subject: Subject) -> None:
    """What an added group does not say is what the constructor said."""
    optimizer = subject.make(named(), lr=0.5, eps=0.25)
    optimizer.add_param_group({"params": [("late.weight", one())]})
    assert optimizer.param_groups[-1]["lr"] == 0.5 and optimizer.param_groups[-1]["eps"] == 0.25
    assert set(DOCUMENTED) <= optimizer.param_groups[-1].keys()


@check
def an_added_group_keeps_its_own_options(subject: Subject) -> None:
    """A new head at a tenth of the rate moves a tenth as far."""
    optimizer, late = subject.make(named(), lr=LR), one()
    optimizer.add_param_group({"params": [("late.weight", late)], "lr": LR / 8, "weight_decay": 0.0})
    before = values([late])
    (sign,) = give_signs([late])
    optimizer.step()
    assert_close([late], [before[0] - LR / 8 * sign])


@check
def an_added_group_keeps_its_names(subject: Subject) -> None:
    """Names of late parameters reach the checkpoint as those of early ones do."""
    optimizer = subject.make(named())
    optimizer.add_param_group({"params": [("late.weight", one())]})
    assert optimizer.param_groups[-1]["param_names"] == ["late.weight"]


@check
def an_added_group_without_names_is_refused_beside_named_ones(subject: Subject) -> None:
    """A checkpoint by name that lacks some names would load silently into the wrong parameters."""
    optimizer = subject.make(named())
    assert_refused(ValueError, lambda: optimizer.add_param_group({"params": [one()]}))


@check
def an_added_group_must_be_a_dict(subject: Subject) -> None:
    """add_param_group(params) instead of add_param_group({"params": params}) is a TypeError."""
    optimizer = subject.make(named())
    assert_refused(TypeError, lambda: optimizer.add_param_group([one()]))  # type: ignore[arg-type]


@check
def an_added_group_must_not_hold_old_parameters(subject: Subject) -> None:
    """A parameter added twice would be stepped twice; the refused group leaves nothing behind."""
    pairs = named()
    optimizer = subject.make(pairs)
    count = len(optimizer.param_groups)
    assert_refused(ValueError, lambda: optimizer.add_param_group({"params": [pairs[0]]}))
    assert len(optimizer.param_groups) == count
    random_steps(optimizer, tensors(pairs), 1)
    assert_moved(tensors(pairs), tensors(named()))


@check
def rates_of_groups_are_their_own(subject: Subject) -> None:
    """Layer-wise learning rates: each group moves by its own."""
    a, b = one(seed=1), one(seed=2)
    optimizer = subject.make([{"params": [a], "lr": LR / 4}, {"params": [b]}], lr=LR, weight_decay=0.0)
    before = values([a, b])
    signs = give_signs([a, b])
    optimizer.step()
    assert_close([a, b], [before[0] - LR / 4 * signs[0], before[1] - LR * signs[1]])


@check
def decay_of_groups_is_their_own(subject: Subject) -> None:
    """No decay on norms and biases is done with groups by everybody."""
    a, b = one(seed=1), one(seed=2)
    optimizer = subject.make([{"params": [a], "weight_decay": 0.0}, {"params": [b]}], lr=LR, weight_decay=0.5)
    before = values([a, b])
    for p in (a, b):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close([a, b], [before[0], before[1] * (1 - LR * 0.5)])


@check
def betas_of_groups_are_their_own(subject: Subject) -> None:
    """A group with betas (0, 0) forgets; its neighbour does not."""
    a, b = one(seed=1), one(seed=1)
    optimizer = subject.make([{"params": [a], "betas": (0.0, 0.0)}, {"params": [b]}], lr=LR)
    for step in range(2):
        for p in (a, b):
            give_gradients([p], step)
        optimizer.step()
    assert (a - b).abs().max() > LR / 100


@check
def an_option_set_in_a_group_is_followed(subject: Subject) -> None:
    """Trainers write group["weight_decay"], ["eps"], ["maximize"] between steps."""
    optimizer, p = subject.make(pair(a := one()), lr=LR), a
    set_all(optimizer, weight_decay=0.5, eps=1.0, maximize=True)
    before = values([p])
    (sign,) = give_signs([p])
    optimizer.step()
    # m / (1 - beta1) = g, v / (1 - beta2) = 1, so the step is LR * sign / (1 + eps), upwards
    assert_close([p], [before[0] * (1 - LR * 0.5) + LR * sign / 2])


@check
def a_users_own_key_in_a_group_stays(subject: Subject) -> None:
    """Schedulers and trainers keep notes in groups: initial_lr, layer numbers, names."""
    p = one()
    optimizer = subject.make([{"params": [p], "lr_scale": 0.5}])
    random_steps(optimizer, [p])
    again = subject.make([{"params": [one()]}])
    again.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr_scale"] == again.param_groups[0]["lr_scale"] == 0.5


@check
def swapped_parameters_go_on(subject: Subject) -> None:
    """Accelerate's FSDP2 replaces parameters in the groups and moves their state; training goes on as before."""
    pairs, kept = named(), named()
    optimizer, reference = subject.make(pairs, lr=LR), subject.make(kept, lr=LR)
    random_steps(optimizer, tensors(pairs))
    random_steps(reference, tensors(kept))
    fresh = []
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            group["params"][i] = new = nn.Parameter(old.detach().clone())
            optimizer.state[new] = optimizer.state.pop(old)
            fresh.append((dict(zip(map(id, tensors(pairs)), range(len(pairs)), strict=True))[id(old)], new))
    after = [new for _, new in sorted(fresh, key=lambda item: item[0])]
    before = values(tensors(pairs))
    random_steps(optimizer, after, 2, start=3)
    random_steps(reference, tensors(kept), 2, start=3)
    assert_same(after, tensors(kept))
    assert_same(tensors(pairs), before)
