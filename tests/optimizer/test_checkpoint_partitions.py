"""Loading second moments of other rules and other optimizers: told apart, refused, converted by block means."""

from __future__ import annotations

import logging

import pytest
import torch

from optimizer import AdamMini, Rules
from optimizer.partition import FactoredLayout
from tests.optimizer.models import GPT, Llama, train
from tests.optimizer.states import refused, same_weights, trained

ADAM = {torch.optim.Adam: {"weight_decay": 0.0}, torch.optim.AdamW: {"weight_decay": 0.01}}


SHARED = ["adam_mini", "pytorch_default", "slim_adam", "short_run", "adam_mini_v1_0", "factored"]


@pytest.mark.parametrize("new", [*SHARED, "elementwise"])
@pytest.mark.parametrize("old", [*SHARED, "elementwise"])
@pytest.mark.parametrize("make", [Llama, GPT])
def test_every_shipped_partition_is_told_from_every_other(make, old: str, new: str) -> None:
    """Also those whose second moments have the same shapes: one scalar per tensor is not one per row."""
    _, source = trained(make(), rules=old)
    model = make()
    target = AdamMini(model, rules=new)
    same = source.layouts == target.layouts
    if same:
        target.load_state_dict(source.state_dict())
    else:
        refused(target, source.state_dict(), f"saved under rules '{old}', this optimizer has rules '{new}'")
        target.load_state_dict(source.state_dict(), convert=True)
    train(model, target)


def test_refusals_name_both_partitions_the_first_parameter_and_how_many_more() -> None:
    _, opt = trained(rules="elementwise")
    refused(
        AdamMini(Llama()), opt.state_dict(),
        r"rules 'elementwise'.*rules 'adam_mini'.*tok_embeddings\.weight.*\(11, 16\).*\(11, 1\).*"
        r"\(and 20 more parameters do not fit\).*convert=True",
    )  # fmt: skip


def test_rules_of_another_name_and_the_same_blocks_are_welcome() -> None:
    _, opt = trained(rules=Rules("mine", Rules("adam_mini").units))
    AdamMini(Llama()).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("kind", ADAM)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_and_adamw_continue_under_elementwise(kind, amsgrad: bool, caplog) -> None:
    a, b = Llama(), Llama()
    adam = kind(a.parameters(), lr=1e-2, amsgrad=amsgrad, **ADAM[kind])
    train(a, adam)
    b.load_state_dict(a.state_dict())
    ours = AdamMini(b.parameters(), rules="elementwise")
    with caplog.at_level(logging.INFO, "optimizer"):
        ours.load_state_dict(adam.state_dict())
    assert ("max_exp_avg_sq dropped" in caplog.text) == amsgrad
    assert not {"amsgrad", "decoupled_weight_decay"} & set(ours.param_groups[0])
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in ours.state.values())
    if not amsgrad:
        train(a, adam, range(3, 6))
        train(b, ours, range(3, 6))
        same_weights(a, b, 1e-6)


@pytest.mark.parametrize(("kind", "decay", "said"), [(torch.optim.Adam, 0.1, True), (torch.optim.Adam, 0.0, False),
                                                     (torch.optim.AdamW, 0.1, False)])  # fmt: skip
def test_another_kind_of_weight_decay_is_said(kind, decay: float, said: bool, caplog) -> None:
    model = Llama()
    adam = kind(model.parameters(), weight_decay=decay)
    train(model, adam, range(1))
    AdamMini(model.parameters(), rules="elementwise").load_state_dict(adam.state_dict())
    assert ("AdamMini decays weights as AdamW does (decoupled)" in caplog.text) == said


@pytest.mark.parametrize("rules", SHARED)
def test_adamw_converts_to_any_rules_by_block_means(rules: str, caplog) -> None:
    model = Llama()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, adamw)
    ours = AdamMini(model.parameters(), rules=rules)
    refused(ours, adamw.state_dict(), "rules it does not name")
    with caplog.at_level(logging.INFO, "optimizer"):
        ours.load_state_dict(adamw.state_dict(), convert=True)
    assert "rebuilt from block means" in caplog.text
    for p, layout in zip(ours.param_groups[0]["params"], ours.layouts[0], strict=True):
        v = adamw.state[p]["exp_avg_sq"]
        if isinstance(layout, FactoredLayout):
            for name, axis in (("exp_avg_sq", 1), ("exp_avg_sq_col", 0)):
                torch.testing.assert_close(ours.state[p][name], v.mean(axis, keepdim=True), rtol=1e-5, atol=0)
            continue
        ids = layout.block_ids(p.shape)
        for block in range(layout.n_blocks):
            got = ours.state[p]["exp_avg_sq"].expand_as(p)[ids == block]
            torch.testing.assert_close(got, v[ids == block].mean().expand_as(got), rtol=1e-5, atol=0)
        assert torch.equal(ours.state[p]["exp_avg"], adamw.state[p]["exp_avg"])


@pytest.mark.parametrize(
    ("other", "name"),
    [(torch.optim.Adafactor, "Adafactor"), (torch.optim.NAdam, "NAdam"), (torch.optim.Adamax, "Adamax"),
     (lambda p: torch.optim.SGD(p, momentum=0.9), "SGD"), (torch.optim.RMSprop, "RMSprop"),
     (torch.optim.Adagrad, "Adagrad")],
)  # fmt: skip
def test_states_of_other_optimizers_are_refused_by_name(other, name: str) -> None:
    model = Llama()
    theirs = other(model.parameters())
    train(model, theirs, range(1))
    ours = AdamMini(model.parameters(), rules="elementwise")
    refused(ours, theirs.state_dict(), f"it looks like a state of .*{name}", convert=True)
