"""What an optimizer can be built from, and what it must not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.contract.harness import (
    LR,
    assert_moved,
    assert_refused,
    check,
    give_gradients,
    give_signs,
    named,
    one,
    ours,
    pair,
    tensors,
    values,
)
from tests.contract.subjects import Subject


def works(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """A step moves every parameter, and every parameter is in some group."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in params}
    before = values(params)
    give_gradients(params, 0)
    optimizer.step()
    assert_moved(params, before)


@check
def is_a_torch_optimizer(subject: Subject) -> None:
    """Schedulers, GradScaler and trainers ask isinstance(optimizer, torch.optim.Optimizer)."""
    assert isinstance(subject.make(named()), torch.optim.Optimizer)


@check
def takes_a_list_of_parameters(subject: Subject) -> None:
    """torchtitan and optimizer-in-backward build cls([p], **kwargs): no names."""
    params = tensors(named())
    works(subject.make(params, lr=LR), params)


@check
def takes_a_generator_of_parameters(subject: Subject) -> None:
    """opt = cls(model.parameters()) is how everybody writes it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    works(subject.make(model.parameters(), lr=LR), list(model.parameters()))


@check
def takes_named_parameters(subject: Subject) -> None:
    """opt = cls(model.named_parameters()) keeps the names for checkpoints."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    works(subject.make(model.named_parameters(), lr=LR), list(model.parameters()))


@check
def keeps_the_names(subject: Subject) -> None:
    """Checkpoints and logs that speak of parameters by name find them in param_names."""
    pairs = named()
    optimizer = subject.make(pairs)
    found = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert found.keys() == dict(pairs).keys()
    assert all(found[name] is p for name, p in pairs)


@check
def has_no_names_where_none_were_given(subject: Subject) -> None:
    """An invented param_names would be written into checkpoints and override the names of whoever loads them."""
    optimizer = subject.make([one()])
    assert all("param_names" not in group for group in optimizer.param_groups)


@check
def takes_group_dicts(subject: Subject) -> None:
    """HF, fairseq and everybody with layer-wise rates pass [{"params": ..., "lr": ...}, ...]."""
    a, b = one(seed=1), one(seed=2)
    optimizer = subject.make([{"params": [a], "lr": LR / 2}, {"params": [b]}], lr=LR)
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 2, LR]
    works(optimizer, [a, b])


@check
def takes_group_dicts_of_named_parameters(subject: Subject) -> None:
    """Groups of (name, tensor) pairs keep their names, group by group."""
    a, b = one(seed=1), one(seed=2)
    optimizer = subject.make([{"params": [("a.weight", a)]}, {"params": [("b.weight", b)], "weight_decay": 0.5}], lr=LR)
    assert [group["param_names"] for group in optimizer.param_groups] == [["a.weight"], ["b.weight"]]
    works(optimizer, [a, b])


@check
def takes_a_group_of_one_tensor(subject: Subject) -> None:
    """{"params": tensor} without a list is allowed by torch."""
    p = one()
    works(subject.make([{"params": p}], lr=LR), [p])


@check
def takes_a_group_with_a_generator(subject: Subject) -> None:
    """{"params": model.parameters()} is consumed once and kept."""
    model = nn.Linear(3, 4)
    works(subject.make([{"params": model.parameters()}], lr=LR), list(model.parameters()))


@check
def takes_plain_tensors(subject: Subject) -> None:
    """Optimised inputs and adversarial examples are tensors with requires_grad, not nn.Parameter."""
    p = torch.ones(4, 3, requires_grad=True)
    before = p.detach().clone()
    optimizer = subject.make([("inputs.weight", p)], lr=LR)
    p.grad = torch.ones(4, 3)
    optimizer.step()
    assert_moved([p], [before])


@check(applies=ours)
def takes_a_model(subject: Subject) -> None:
    """cls(model) knows every parameter's name and makes the groups with and without decay itself."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = subject.make(model, lr=LR, weight_decay=0.5)
    assert {group["weight_decay"]: group["param_names"] for group in optimizer.param_groups} == {
        0.5: ["0.weight", "1.weight"], 0.0: ["0.bias", "1.bias"],
    }  # fmt: skip
    works(optimizer, list(model.parameters()))


@check
def leaves_the_callers_list_alone(subject: Subject) -> None:
    """A list used for clip_grad_norm_ afterwards must still hold what the caller put there."""
    pairs = named()
    given = list(pairs)
    subject.make(given)
    assert len(given) == len(pairs) and all(a is b for a, b in zip(given, pairs, strict=True))


@check
def refuses_a_bare_tensor(subject: Subject) -> None:
    """cls(tensor) would optimise its rows one by one; torch says TypeError."""
    subject.make([one()])
    assert_refused(TypeError, lambda: subject.make(one()))


@check
def refuses_an_empty_list(subject: Subject) -> None:
    """A filter that matched nothing must not train nothing in silence."""
    assert_refused(ValueError, lambda: subject.make([]))
    assert_refused(ValueError, lambda: subject.make(iter(())))


@check
def refuses_what_is_no_tensor(subject: Subject) -> None:
    """A number or an array among the parameters is a mistake, named as TypeError."""
    subject.make([{"params": [one(), one()]}])
    for wrong in (1.0, [1.0, 2.0], "weight"):
        assert_refused(TypeError, lambda wrong=wrong: subject.make([{"params": [one(), wrong]}]))


@check
def refuses_a_set(subject: Subject) -> None:
    """A set's order changes between runs, and state would be loaded into the wrong parameters."""
    subject.make([{"params": [one(), one()]}])
    assert_refused(TypeError, lambda: subject.make([{"params": {one(), one()}}]))


@check
def refuses_a_result_of_a_computation(subject: Subject) -> None:
    """A non-leaf never gets a gradient: training it would do nothing."""
    subject.make([{"params": [one()]}])
    assert_refused(ValueError, lambda: subject.make([{"params": [one() * 2]}]))
    assert_refused(ValueError, lambda: subject.make([("x.weight", one() * 2)]))


@check
def refuses_some_with_names_and_some_without(subject: Subject) -> None:
    """Names for half of the parameters would go to the wrong ones."""
    subject.make([{"params": [("a.weight", one())]}, {"params": [("b.weight", one())]}])
    assert_refused(ValueError, lambda: subject.make([{"params": [("a.weight", one()), one()]}]))
    assert_refused(ValueError, lambda: subject.make([{"params": [("a.weight", one())]}, {"params": [one()]}]))


@check
def warns_of_a_parameter_listed_twice(subject: Subject) -> None:
    """Tied weights listed twice would be stepped twice; torch warns."""
    p = one()
    with pytest.warns(UserWarning, match="duplicate"):
        subject.make([{"params": [p, p]}])


@check
def refuses_a_parameter_in_two_groups(subject: Subject) -> None:
    """Two groups that both hold a weight would step it twice, with two rates."""
    p = one()
    subject.make([{"params": [p]}, {"params": [one()]}])
    assert_refused(ValueError, lambda: subject.make([{"params": [p]}, {"params": [p]}]))


@check
def leaves_frozen_parameters_alone(subject: Subject) -> None:
    """A frozen backbone in the list keeps its weights, decay or not, and gets no state."""
    pairs = named()
    frozen = pairs[0][1].requires_grad_(False)
    before = frozen.clone()
    optimizer = subject.make(pairs, lr=LR, weight_decay=0.5)
    give_signs(tensors(pairs[1:]))
    optimizer.step()
    assert_moved(tensors(pairs[1:]), tensors(named()[1:]))
    assert torch.equal(frozen, before) and not optimizer.state.get(frozen)


@check
def builds_on_the_meta_device(subject: Subject) -> None:
    """Large models are built on meta first, and the optimizer with them."""
    p = nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = subject.make(pair(p))
    assert optimizer.param_groups[0]["params"][0] is p


@check
def shows_its_groups(subject: Subject) -> None:
    """print(optimizer) tells the class and every option of every group."""
    text = repr(subject.make([{"params": [one()], "lr": 0.125}, {"params": [one()], "weight_decay": 0.375}]))
    assert text.startswith(type(subject.make(named())).__name__ + " (")
    assert all(word in text for word in ("Parameter Group 1", "lr: 0.125", "weight_decay: 0.375", "betas: "))
