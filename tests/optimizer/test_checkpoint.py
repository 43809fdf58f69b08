"""Loading: what a checkpoint decides, what the running optimizer does, and what is refused before anything moves."""

from __future__ import annotations

import copy
import io
import logging
import re
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optimizer import AdamMini, Rules, tag
from optimizer.state import first_moments as moment
from optimizer.step import moments as few_bits
from tests.optimizer.models import GPT, Llama, train
from tests.optimizer.states import by_name, equal, refused, same_weights, trained

ADAM = {torch.optim.Adam: {"weight_decay": 0.0}, torch.optim.AdamW: {"weight_decay": 0.01}}


# --- what is said, what is kept ------------------------------------------------------------------------------------


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


# --- other partitions ----------------------------------------------------------------------------------------------

SHARED = ["adam_mini", "pytorch_default", "slim_adam", "short_run", "adam_mini_v1_0"]


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
        r"\(20 more parameters likewise\).*convert=True",
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
    assert ("here it is decoupled" in caplog.text) == said


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
        ids, v = layout.block_ids(p.shape), adamw.state[p]["exp_avg_sq"]
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
    assert [group["weight_decay"] for group in back.param_groups] == [0.5, 0.5]
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(back).items())


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
    refused(unnamed, document, "knew its parameters otherwise.*from the model")
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


# --- moments in few bits, compensation -----------------------------------------------------------------------------


def wide(exp_avg_dtype: Any, seed: int = 0) -> tuple[nn.Parameter, AdamMini]:
    """One parameter large enough for codes, beside one that is not."""
    generator = torch.Generator().manual_seed(seed)
    large = nn.Parameter(torch.randn(64, 72, generator=generator))
    small = nn.Parameter(torch.randn(8, generator=generator))
    opt = AdamMini([("mlp.w1.weight", large), ("norm.weight", small)], exp_avg_dtype=exp_avg_dtype)
    return large, opt


def codes_of(p: nn.Parameter, kind: str) -> dict[str, torch.Tensor]:
    """Quantised state of a random first moment."""
    m = torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    codes, scale = few_bits.quantise(m, few_bits.FORMATS[kind], step=3, seed=0)
    v = torch.rand(64, 1, generator=torch.Generator().manual_seed(8))
    return {"step": torch.tensor(3.0), "exp_avg": codes, "exp_avg_scale": scale, "exp_avg_sq": v, "plain": m}


@pytest.mark.parametrize("piece", [1, 1 << 18])
@pytest.mark.parametrize("new", [None, torch.bfloat16, "int8", "int4"])
@pytest.mark.parametrize("old", [None, "int8", "int4"])
def test_first_moments_change_their_form_on_loading(old: Any, new: Any, piece: int, caplog, monkeypatch) -> None:
    """The same bits whatever the size of the pieces it is done in."""
    monkeypatch.setattr(moment, "_PIECE", piece)
    p, opt = wide(old)
    state = codes_of(p, old or "int8")
    exact = state.pop("plain")
    small = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}
    if old is None:
        state["exp_avg"] = exact
        del state["exp_avg_scale"]
    else:
        exact = few_bits.dequantise(state["exp_avg"], state["exp_avg_scale"], 72)
    document = {"state": {0: state, 1: small}, "param_groups": opt.state_dict()["param_groups"]}
    q, other = wide(new)
    with caplog.at_level(logging.INFO, "optimizer"):
        other.load_state_dict(document)
    got = other.state[q]
    if new in ("int8", "int4"):
        if old == new:
            assert equal(got, state) and not caplog.records
            return
        codes, scale = few_bits.quantise(exact, few_bits.FORMATS[new], step=3, seed=0)
        assert equal(got, {**state, "exp_avg": codes, "exp_avg_scale": scale})
        assert f"exp_avg quantised from {old or 'torch.float32'} to {new} (1x)" in caplog.text
    else:
        assert equal(got["exp_avg"], exact.to(new or torch.float32)) and "exp_avg_scale" not in got
        assert (f"exp_avg dequantised from {old} to" in caplog.text) == (old is not None)
    assert other.state[other.param_groups[0]["params"][1]]["exp_avg"].is_floating_point(), "small ones stay plain"


def test_scales_of_another_shape_are_refused() -> None:
    p, opt = wide("int8")
    state = codes_of(p, "int8")
    state["exp_avg_scale"] = state["exp_avg_scale"][:-1]
    del state["plain"]
    document = {"state": {0: state}, "param_groups": opt.state_dict()["param_groups"]}
    refused(wide(None)[1], document, r"exp_avg_scale of parameter 0 .*\(63, 1\).*needs \(64, 1\)")


def test_compensation_appears_where_wanted_and_goes_where_not(caplog) -> None:
    p = nn.Parameter(torch.randn(4, 6).bfloat16())
    state = {"step": 3, "exp_avg": torch.ones(4, 6).bfloat16(), "exp_avg_sq": torch.ones(4, 1)}
    with caplog.at_level(logging.INFO, "optimizer"):
        kahan = AdamMini([("wo.weight", p)], bf16_rounding="kahan")
        document = {"state": {0: state}, "param_groups": kahan.state_dict()["param_groups"]}
        kahan.load_state_dict(document)
        assert "compensation starts at zero" in caplog.text
        assert equal(kahan.state[p]["compensation"], torch.zeros(4, 6, dtype=torch.bfloat16))
        state["compensation"] = torch.full((4, 6), 0.5, dtype=torch.bfloat16)
        kahan.load_state_dict(document)
        assert equal(kahan.state[p]["compensation"], state["compensation"])
        assert kahan.state[p]["compensation"] is not state["compensation"]
        plain = AdamMini([("wo.weight", p)])
        plain.load_state_dict(document)
    assert "compensation dropped" in caplog.text and "compensation" not in plain.state[p]


# --- torch.distributed.checkpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_distributed_checkpoints_round_trip(flat: bool, named: bool, tmp_path) -> None:
    """Through files, into an optimizer without state: its weights stay, its lr is the checkpoint's."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build(model: nn.Module, lr: float) -> AdamMini:
        return AdamMini(model if named else model.parameters(), lr=lr, weight_decay=0.1)

    model = Llama()
    opt = build(model, 1e-2)
    train(model, opt)
    dcp.save({"optim": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path)
    twin = Llama(seed=1)
    before = copy.deepcopy(twin)
    other = build(twin, 0.5)
    document = {"optim": get_optimizer_state_dict(twin, other, options=options)}
    same_weights(twin, before)
    assert other.param_groups[0]["lr"] == 0.5, "the zero lr of torch's initialisation was left behind"
    dcp.load(document, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, document["optim"], options=options)
    same_weights(twin, before)
    assert equal(other.state_dict(), opt.state_dict())
    assert all("rules" not in group for group in other.param_groups)


def test_distributed_checkpoints_load_into_other_groups() -> None:
    """torch hands over one saved group's options and names for all; the parameters' own keys say which is which."""
    model, opt = trained()
    document = get_optimizer_state_dict(model, opt)
    one = AdamMini(model.named_parameters())
    set_optimizer_state_dict(model, one, document)
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(one).items())


def test_distributed_checkpoints_of_another_partition_are_refused() -> None:
    model, opt = trained(rules="pytorch_default")
    document = get_optimizer_state_dict(model, opt)
    other = AdamMini(Llama())
    with pytest.raises(ValueError, match=re.escape("rules 'pytorch_default'")):
        other.load_state_dict(document)


def test_old_flat_documents_without_rules_load() -> None:
    """A live group must not have keys that older flat checkpoints lack: torch looks each of them up."""
    model, opt = trained()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    document = {key: value for key, value in get_optimizer_state_dict(model, opt, options=options).items()
                if not key.endswith(".rules")}  # fmt: skip
    twin = Llama(seed=1)
    other = AdamMini(twin)
    set_optimizer_state_dict(twin, other, document, options=options)
    assert equal(other.state_dict(), opt.state_dict())


def test_older_files_need_a_partial_load_and_get_one(tmp_path) -> None:
    """What the docs say of files without rules: torch's default planner wants every key, a partial one does not."""
    model, opt = trained()
    document = get_optimizer_state_dict(model, opt)
    for group in document["param_groups"]:
        del group["rules"]
    dcp.save({"optim": document}, checkpoint_id=tmp_path)
    twin = Llama(seed=1)
    other = AdamMini(twin)
    wanted = {"optim": get_optimizer_state_dict(twin, other)}
    with pytest.raises(dcp.api.CheckpointException, match="rules"):
        dcp.load(wanted, checkpoint_id=tmp_path)
    dcp.load(wanted, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(twin, other, wanted["optim"])
    assert equal(other.state_dict(), opt.state_dict())
