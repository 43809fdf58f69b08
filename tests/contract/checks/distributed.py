"""torch.distributed.checkpoint.state_dict, in one process: names instead of positions, flattened or not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.contract.harness import LR, assert_same, check, give_gradients, set_all, values
from tests.contract.subjects import Subject


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)})


def _built(subject: Subject, steps: int = 3, **options: Any) -> tuple[nn.Module, Any]:
    model = _model()
    optimizer = subject.make(model.named_parameters(), **{"lr": LR, **options})
    _train(model, optimizer, steps)
    return model, optimizer


def _train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        give_gradients(list(model.parameters()), step)
        optimizer.step()
        optimizer.zero_grad()


def _resumes(subject: Subject, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = _built(subject, weight_decay=0.1)
    document = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    again, resumed = _built(subject, 0, lr=0.5)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, resumed, document, options=options)
    _train(model, optimizer, 3, start=50)
    _train(again, resumed, 3, start=50)
    assert_same(model.parameters(), again.parameters())
    assert [g["lr"] for g in resumed.param_groups] == [LR] * len(resumed.param_groups)


@check
def dcp_speaks_of_names(subject: Subject) -> None:
    """get_optimizer_state_dict keys the state by the model's names."""
    model, optimizer = _built(subject)
    document = get_optimizer_state_dict(model, optimizer)
    assert document["state"].keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert_same([document["state"][name]["exp_avg"]], [optimizer.state[p]["exp_avg"]])


@check
def dcp_resumes_to_the_bit(subject: Subject) -> None:
    """set_optimizer_state_dict into a fresh optimizer goes on with the same weights."""
    _resumes(subject, flatten=False)


@check
def dcp_resumes_to_the_bit_when_flattened(subject: Subject) -> None:
    """flatten_optimizer_state_dict=True, as torchtitan saves: every option of every group by parameter name."""
    _resumes(subject, flatten=True)


@check
def dcp_makes_state_without_moving_weights(subject: Subject) -> None:
    """DCP takes a step with lr 0 and zero gradients so that there is state to load into: weights stay, decay or not."""
    model, optimizer = _built(subject, 0, weight_decay=0.5)
    before = values(model.parameters())
    document = get_optimizer_state_dict(model, optimizer)
    assert_same(model.parameters(), before)
    assert [g["lr"] for g in optimizer.param_groups] == [LR] * len(optimizer.param_groups)
    names = {"step", "exp_avg", "exp_avg_sq"}
    assert all(state.keys() - {"exp_avg_sq_col"} == names for state in document["state"].values())
    assert not any(state["exp_avg"].any() for state in document["state"].values())


@check
def dcp_loads_in_place(subject: Subject) -> None:
    """dcp.load writes into the tensors that get_optimizer_state_dict handed out: they are the optimizer's own."""
    model, optimizer = _built(subject)
    document = get_optimizer_state_dict(model, optimizer)
    for name, p in model.named_parameters():
        document["state"][name]["exp_avg"].fill_(0.25)
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.full_like(p, 0.25))


@check
def dcp_leaves_frozen_parameters_out(subject: Subject) -> None:
    """A model with a frozen half saves and loads state for the other half."""

    def build() -> tuple[nn.Module, Any]:
        model = _model()
        model["up_proj"].requires_grad_(False)  # type: ignore[index]
        return model, subject.make(((n, p) for n, p in model.named_parameters() if p.requires_grad), lr=LR)

    model, optimizer = build()
    trainable = [p for p in model.parameters() if p.requires_grad]
    give_gradients(trainable, 0)
    optimizer.step()
    document = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert document["state"].keys() == {"down_proj.weight", "down_proj.bias"}
    again, resumed = build()
    set_optimizer_state_dict(again, resumed, document)
    others = [p for p in again.parameters() if p.requires_grad]
    assert_same(*([o.state[p]["exp_avg"] for p in some] for o, some in ((optimizer, trainable), (resumed, others))))


@check
def dcp_keeps_a_rate_that_changed(subject: Subject) -> None:
    """A scheduler's rate at the time of saving is the one training resumes with."""
    model, optimizer = _built(subject)
    set_all(optimizer, lr=LR / 8)
    document = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    again, resumed = _built(subject, 0)
    set_optimizer_state_dict(again, resumed, document)
    assert [g["lr"] for g in resumed.param_groups] == [LR / 8] * len(resumed.param_groups)
