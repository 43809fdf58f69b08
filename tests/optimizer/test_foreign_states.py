"""States of other optimizers and of other rules: what everybody has loads, what means something else is refused.

``test_checkpoint`` has the loading itself; here are documents whose groups, names or rules are not this optimizer's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Rules
from optimizer.memory import CPUOffload, gradient_release
from optimizer.tools.convert.file import converted
from tests.optimizer.models import GPT, Llama, batch, loss_of, train
from tests.optimizer.states import equal, refused, trained

OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch.optim.SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "torch.optim.RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "torch.optim.Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "torch.optim.Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "torch.optim.ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "torch.optim.Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "torch.optim.NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "another kind": lambda p: Odd(p),
}


class Odd(torch.optim.Optimizer):
    """An optimizer nobody knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "secret": 1})


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("options", [{}, {"convert": True}], ids=str)
def test_an_optimizer_without_state_of_its_own_is_still_told(name: str, options: dict[str, Any]) -> None:
    """Before its first step any optimizer's document is groups alone, and SGD's is for good."""
    model, opt = trained()
    document = OTHERS[name]([p for group in opt.param_groups for p in group["params"]]).state_dict()
    refused(AdamMini(list(model.parameters()), lr=3e-4), document, name, **options)
    with pytest.raises(ValueError, match=name):
        converted(document, model)


def test_groups_without_options_load_as_before() -> None:
    model, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    document["param_groups"] = [{"params": group["params"]} for group in document["param_groups"]]
    other = AdamMini(Llama(), lr=3e-4)
    other.load_state_dict(document)
    assert other.param_groups[0]["lr"] == 3e-4 and len(other.state) == len(list(model.parameters()))


# --- rules ----------------------------------------------------------------------------------------------------------


COARSE = Rules("adam_mini").override({"*.feed_forward.*": "TENSOR"})


def test_overrides_are_part_of_what_rules_are_called() -> None:
    """The layouts have the same aligned shapes, so that nothing but name and values tells them apart."""
    _, opt = trained(rules=COARSE)
    document = opt.state_dict()
    assert all(group["rules"] != "adam_mini" for group in document["param_groups"])
    refused(trained()[1], document, r"rules 'adam_mini#[0-9a-f]{8}', this optimizer has rules 'adam_mini'")
    _, same = trained(rules=Rules("adam_mini").override({"*.feed_forward.*": "TENSOR"}, name="another name"))
    same.load_state_dict(document)
    assert equal([*same.state_dict()["state"].values()], [*document["state"].values()])
    _, renamed = trained(rules=Rules("adam_mini").override({"*.feed_forward.*": "OUT_NEURON"}))
    with pytest.raises(ValueError, match="adam_mini#"):
        renamed.load_state_dict(document)


def test_units_are_part_of_it_too_and_older_names_still_load() -> None:
    mine = Rules("mine", {"QUERY": "TENSOR"})
    _, opt = trained(rules=mine)
    document = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(document)
    refused(trained(rules=Rules("mine", {"QUERY": "OUT_NEURON"}))[1], document, "mine#")
    for group in document["param_groups"]:
        group["rules"] = "mine"  # as an older version wrote it
    opt.load_state_dict(document)
    assert [group["rules"] for group in trained()[1].state_dict()["param_groups"]] == ["adam_mini"] * 2


# --- one group of AdamW's into our two ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Llama, GPT])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_checkpoint_that_everybody_has(
    caplog: pytest.LogCaptureFixture, make: Callable[[], nn.Module], frozen: bool, named: bool
) -> None:
    caplog.set_level(logging.INFO, logger="optimizer")
    model = make()
    if frozen:
        next(iter(model.parameters())).requires_grad_(False)
    adamw = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=2e-3, weight_decay=0.3)
    train(model, adamw)
    opt = AdamMini(model, lr=1e-2, rules="elementwise")
    document = adamw.state_dict()
    if frozen and named:
        refused(opt, document, "has 1 that this optimizer does not have")
        return
    opt.load_state_dict(document)
    for p in model.parameters():
        if p.requires_grad:
            torch.testing.assert_close(opt.state[p]["exp_avg"], adamw.state[p]["exp_avg"], rtol=0, atol=0)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.3, 0.0]
    assert [group["lr"] for group in opt.param_groups] == [2e-3, 2e-3]
    assert "group 1 keeps its weight_decay of 0" in caplog.text and "0.3" in caplog.text
    assert len({name for group in opt.param_groups for name in group["param_names"]}) == len(opt.state)
    train(model, opt)
    other = AdamMini(model, lr=1e-2, weight_decay=0.1)
    other.load_state_dict(document, convert=True)
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]


def test_groups_of_the_callers_own_keep_a_decay_of_zero_too() -> None:
    model = Llama()
    adamw = torch.optim.AdamW(model.named_parameters(), weight_decay=0.3)
    train(model, adamw)
    pairs = list(model.named_parameters())
    split = [{"params": [x for x in pairs if x[1].ndim >= 2], "weight_decay": 0.1},
             {"params": [x for x in pairs if x[1].ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    opt = AdamMini(split, rules="elementwise")
    opt.load_state_dict(adamw.state_dict())
    assert [group["weight_decay"] for group in opt.param_groups] == [0.3, 0.0]
    one = AdamMini(model.named_parameters(), rules="elementwise")  # no decay of its own, and no group beside it
    one.load_state_dict(adamw.state_dict())
    assert one.param_groups[0]["weight_decay"] == 0.3


def test_what_is_not_sure_is_refused_as_before() -> None:
    """Without the model nobody knows the order; a document of another size is no document of this model."""
    model = Llama()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw)
    pickled = copy.deepcopy(AdamMini(model))
    refused(pickled, adamw.state_dict(), "different number of parameter groups", convert=True)
    shorter = torch.optim.AdamW(list(model.parameters())[1:]).state_dict()
    refused(AdamMini(model), shorter, "different number of parameter groups", convert=True)


# --- what is held ---------------------------------------------------------------------------------------------------


def test_frozen_parameters_have_no_bytes() -> None:
    model = Llama()
    model.layers.requires_grad_(False)
    opt = AdamMini(model.parameters())
    train(model, opt)
    held = sum(t.numel() * t.element_size() for state in opt.state.values() for t in state.values())
    assert sum(opt.state_bytes().values()) == held
    model.requires_grad_(False)  # state that is there stays counted
    assert sum(opt.state_bytes().values()) == held


# --- wrappers that need an AdamMini ---------------------------------------------------------------------------------


def test_gradient_release_and_offload_say_what_they_take() -> None:
    model = Llama()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="optimizer=AdamW cannot step one parameter alone; give gradient_release an Ad"):
        gradient_release(adamw)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer=CPUOffload .*offload_gradients=True"):
        gradient_release(CPUOffload(model))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer=Llama"):
        gradient_release(model)  # type: ignore[arg-type]
    for given in (adamw, AdamMini(model)):
        with pytest.raises(TypeError, match=r"params is an optimizer .* pass the model"):
            CPUOffload(given)  # type: ignore[arg-type]
    loss_of(model, batch(11, 0)).backward()


def test_offload_steps_what_is_appended_and_refuses_other_edits() -> None:
    model, more = Llama(), nn.Parameter(torch.ones(3, 2))
    opt = CPUOffload(model, lr=0.1)
    opt.param_groups[0]["params"].append(more)
    more.grad = torch.ones_like(more)
    opt.step()
    assert not torch.equal(more, torch.ones(3, 2)) and len(opt.state_dict()["state"]) == 1
    del opt.param_groups[0]["params"][1]
    with pytest.raises(RuntimeError, match="taken out of its place"):
        opt.step()


def test_offload_converts_as_adam_mini_does() -> None:
    model = Llama()
    adamw = torch.optim.AdamW(model.named_parameters())
    train(model, adamw)
    opt = CPUOffload(model)
    opt.load_state_dict(adamw.state_dict(), convert=True)
    assert len(opt.state) == len(list(model.parameters()))
