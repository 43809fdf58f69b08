"""Loading a state dict: what it decides, what the running optimizer decides, and what is refused unchanged."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini, tag
from tests.optimizer.models import GPT, Llama, train
from tests.optimizer.states import by_name, equal, refused, trained


def test_a_checkpoint_names_its_rules_and_survives_safe_pickling() -> None:
    _, opt = trained(rules="slim_adam")
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert [group["rules"] for group in saved["param_groups"]] == ["slim_adam"] * 2
    assert all("rules" not in group for group in opt.param_groups), "a live group could be wrong"
    _, again = trained(rules="slim_adam")
    again.load_state_dict(saved)
    assert equal(again.state_dict(), opt.state_dict())
    assert all("rules" not in group for group in again.param_groups)


def test_documents_without_rules_load_and_documents_with_rules_load_into_torch() -> None:
    """Older checkpoints of ours name no rules; AdamW takes ours and steps on."""
    model, opt = trained(rules="elementwise")
    document = opt.state_dict()
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in opt.param_groups])
    adamw.load_state_dict(document)
    train(model, adamw)
    document = opt.state_dict()
    for group in document["param_groups"]:
        del group["rules"]
    trained(rules="elementwise")[1].load_state_dict(document)


def test_hooks_run_as_in_torch_and_see_what_they_should() -> None:
    """State-dict hooks see the rules; the last pre-hook's document is loaded; post-hooks see the state in place."""
    model, opt = trained()
    seen: list[Any] = []
    opt.register_state_dict_post_hook(lambda _, d: seen.append(d["param_groups"][0]["rules"]))
    document = opt.state_dict()
    other = AdamMini(Llama(seed=1))
    replaced = copy.deepcopy(document)
    replaced["param_groups"][0]["lr"] = 0.125
    other.register_load_state_dict_pre_hook(lambda _, d: replaced)
    other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    other.load_state_dict(document)
    assert seen == ["adam_mini", len(list(model.parameters()))]
    assert other.param_groups[0]["lr"] == 0.125
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1
    with pytest.raises(ValueError):
        AdamMini(GPT()).load_state_dict(document)
    assert len(opt._optimizer_state_dict_post_hooks) == 1, "the naming hook was left behind"


def test_nothing_of_the_callers_is_kept_or_changed() -> None:
    _, opt = trained()
    document = opt.state_dict()
    document["state"][0]["mine"] = {"list": [torch.ones(2)]}  # torch carries what it does not know; so do we
    given = copy.deepcopy(document)
    model, again = trained(Llama(seed=1))
    again.load_state_dict(document)
    train(model, again)
    for group in again.param_groups:
        group["lr"] = 7.0
    again.state[again.param_groups[0]["params"][0]]["mine"]["list"][0].add_(1)
    assert equal(document, given)


def test_the_running_optimizers_dtypes_and_engine_win_and_the_rest_is_the_checkpoints(caplog) -> None:
    _, opt = trained(exp_avg_dtype=torch.bfloat16, betas=(0.8, 0.9), eps=1e-6, fused=False, maximize=True)
    model = Llama()
    other = AdamMini(model, lr=1.0, fused=None, foreach=False)
    with caplog.at_level(logging.INFO, "optimizer"):
        other.load_state_dict(opt.state_dict())
    assert len(caplog.records) == 1, "one line a load"
    assert f"exp_avg cast from torch.bfloat16 to torch.float32 ({len(opt.state)}x)" in caplog.text
    for group, saved in zip(other.param_groups, opt.param_groups, strict=True):
        assert group["fused"] is None and group["foreach"] is False and group["exp_avg_dtype"] is None
        assert all(group[key] == saved[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize"))
    for p, state in other.state.items():
        assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].stride() == p.stride()
        assert state["exp_avg_sq"].dtype == torch.float32 and state["step"].item() == 3
    train(model, other)


def test_strides_follow_the_parameter() -> None:
    """A transposed parameter gets a transposed first moment, whatever the checkpoint's strides."""
    p = nn.Parameter(torch.randn(4, 6).t())
    p.grad = torch.randn_like(p)
    opt = AdamMini([("weight", p)], rules="elementwise", fused=False)
    opt.step()
    document = copy.deepcopy(opt.state_dict())
    document["state"][0] = {key: value.contiguous() for key, value in document["state"][0].items()}
    opt.load_state_dict(document)
    assert opt.state[p]["exp_avg"].stride() == p.stride()
    assert opt.state[p]["exp_avg_sq"].is_contiguous()


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), torch.tensor([3]), torch.tensor(3.0, dtype=torch.float64)])
def test_step_as_a_number_or_a_tensor(step: Any) -> None:
    model, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    for state in document["state"].values():
        state["step"] = step
    opt.load_state_dict(document)
    for state in opt.state.values():
        assert state["step"].dtype == torch.float32 and state["step"].shape == () and state["step"].item() == 3
    train(model, opt)


@pytest.mark.parametrize("step", [None, -1, float("nan"), "3", True, torch.ones(2)])
def test_a_step_that_cannot_be_is_refused(step: Any) -> None:
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    document["state"][4]["step"] = step
    refused(opt, document, r"step of parameter 4 of group 0 \(layers\.0\.attention\.wo\.weight\) is ")


def test_a_missing_step_says_what_to_do() -> None:
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    del document["state"][4]["step"]
    refused(opt, document, r"parameter 4 .* has no 'step'.*put the number of steps it has taken there")


def test_options_that_old_groups_lack_stay_as_they_are() -> None:
    _, opt = trained(maximize=True)
    document = copy.deepcopy(opt.state_dict())
    for group in document["param_groups"]:
        for key in set(group) - {"params", "lr", "betas"}:
            del group[key]
    opt.load_state_dict(document)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert all(group["maximize"] is True for group in opt.param_groups)
    assert all(set(group) >= set(opt.defaults) for group in opt.param_groups)


def test_a_tensor_lr_stays_a_tensor_of_its_own() -> None:
    """From a tensor and from a number; two groups never share one by accident of loading."""
    _, opt = trained()
    other = AdamMini(Llama(), lr=torch.tensor(1e-3))
    other.load_state_dict(opt.state_dict())
    first, second = (group["lr"] for group in other.param_groups)
    assert isinstance(first, torch.Tensor) and first.item() == pytest.approx(1e-2) and first is not second
    document = other.state_dict()
    _, third = trained()
    third.load_state_dict(document)
    assert isinstance(third.param_groups[0]["lr"], torch.Tensor)
    assert third.param_groups[0]["lr"] is not document["param_groups"][0]["lr"]


def test_extra_keys_of_schedulers_travel() -> None:
    _, opt = trained()
    torch.optim.lr_scheduler.StepLR(opt, 1)
    other = AdamMini(Llama())
    other.load_state_dict(opt.state_dict())
    assert [group["initial_lr"] for group in other.param_groups] == [1e-2, 1e-2]


def test_hyper_parameters_that_cannot_be_are_refused() -> None:
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    document["param_groups"][1]["betas"] = (0.9, 1.5)
    refused(opt, document, r"group 1 of the checkpoint .*betas\[1\]=1\.5")


def test_what_is_no_optimizer_state_is_refused() -> None:
    model, opt = trained()
    refused(opt, {"model": model.state_dict(), "optimizer": opt.state_dict()}, "it has .'model', 'optimizer'.")
    refused(opt, {}, "not the state dict of an optimizer")


@pytest.mark.parametrize("change", ["exp_avg", "exp_avg_sq", "no exp_avg", "a list", "codes without scale"])
def test_states_that_do_not_fit_are_refused(change: str) -> None:
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    state = document["state"][5]
    if change == "exp_avg":
        state["exp_avg"] = torch.zeros(3, 3)
    elif change == "exp_avg_sq":
        state["exp_avg_sq"] = torch.zeros(7)
    elif change == "no exp_avg":
        del state["exp_avg"]
    elif change == "a list":
        state["exp_avg"] = [0.0]
    else:
        state["exp_avg"] = state["exp_avg"].to(torch.int8)
    words = r"parameter 5 of group 0 \(layers\.0\.feed_forward\.w1\.weight\)"
    refused(opt, document, words)
    refused(opt, document, words, convert=True)


# --- names ---------------------------------------------------------------------------------------------------------


def test_parameters_are_matched_by_name_in_any_order_and_grouping() -> None:
    """Two groups into one in reverse order, and back: the same training."""
    model, opt = trained()
    twin = Llama()
    twin.load_state_dict(model.state_dict())
    one = AdamMini(list(reversed(list(twin.named_parameters()))), weight_decay=0.5)
    one.load_state_dict(opt.state_dict())
    assert one.param_groups[0]["lr"] == 1e-2
    assert one.param_groups[0]["weight_decay"] == 0.5, "0.1 and 0.0 were saved: the group keeps its own"
    for name, state in by_name(one).items():
        assert equal(state, by_name(opt)[name])
    assert one.param_groups[0]["param_names"] == [name for name, _ in reversed(list(twin.named_parameters()))]
    back = AdamMini(twin)
    back.load_state_dict(one.state_dict())
    assert [group["weight_decay"] for group in back.param_groups] == [0.5, 0.0]  # norms and biases keep theirs
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(back).items())


def test_a_checkpoint_of_rules_that_were_renamed_names_their_new_name() -> None:
    """Before ``derived`` was chosen by training runs, the name denoted what is ``derived_blocks`` today."""
    _, opt = trained(rules="derived_blocks")
    document = copy.deepcopy(opt.state_dict())
    for group in document["param_groups"]:
        group["rules"] = "derived"
    refused(
        AdamMini(Llama(), rules="derived"), document, "perhaps before .*Build the optimizer with rules='derived_blocks'"
    )
    other = AdamMini(Llama(), rules="derived_blocks")
    other.load_state_dict(document)
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(other).items())


def test_names_of_wrappers_do_not_matter() -> None:
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    for group in document["param_groups"]:
        group["param_names"] = ["module._orig_mod." + name for name in group["param_names"]]
    other = AdamMini(Llama())
    other.load_state_dict(document)
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(other).items())


def test_missing_and_extra_parameters_are_named() -> None:
    _, opt = trained(Llama(layers=1))
    words = r"lacks 9 of this optimizer's parameters \(layers\.1\.attention\.wq\.weight, .*, and 6 more\)"
    refused(AdamMini(Llama(layers=2)), opt.state_dict(), words)
    _, larger = trained(Llama(layers=2))
    words = r"has 9 that this optimizer does not have \(layers\.1\..*, and 6 more\)"
    refused(AdamMini(Llama(layers=1)), larger.state_dict(), words)


def test_without_names_positions_count_as_in_torch() -> None:
    model, opt = trained(Llama())
    document = copy.deepcopy(opt.state_dict())
    for group in document["param_groups"]:
        del group["param_names"]
    unnamed = AdamMini([{"params": group["params"]} for group in opt.param_groups])
    refused(unnamed, document, "its parameters had other roles.*from the model")
    tag(model)
    unnamed = AdamMini([{"params": group["params"]} for group in opt.param_groups])
    unnamed.load_state_dict(document)
    assert all(equal(unnamed.state[p], state) for p, state in opt.state.items())
    refused(AdamMini(list(model.parameters())), document, "different number of parameter groups: 2, the optimizer 1")
    document["param_groups"][0]["params"].pop()
    refused(unnamed, document, "doesn't match the size of optimizer's group")


def test_state_of_some_parameters_only() -> None:
    """A parameter that had no gradient yet has no state, before and after; what was there is replaced."""
    _, opt = trained()
    document = copy.deepcopy(opt.state_dict())
    del document["state"][0]
    model, other = trained(Llama())
    other.load_state_dict(document)
    assert len(other.state) == len(document["state"])
    train(model, other)


def test_flat_pieces_of_a_tensor_load_as_they_were_saved() -> None:
    """Sharding by flat ranges swaps parameters for 1-D pieces: their layouts speak of the whole tensor."""
    opt = AdamMini(Llama())
    piece = nn.Parameter(torch.randn(40))
    opt.param_groups[0]["params"][0] = piece
    document = copy.deepcopy(opt.state_dict())
    document["state"] = {0: {"step": 3, "exp_avg": torch.randn(40), "exp_avg_sq": torch.rand(3, 1)}}
    opt.load_state_dict(document)
    assert equal(opt.state[piece]["exp_avg_sq"], document["state"][0]["exp_avg_sq"])
    document["state"][0]["exp_avg"] = torch.randn(41)
    refused(opt, document, r"exp_avg of parameter 0 .*\(41,\).*\(40,\)")
