"""Checkpoints of the published adam-mini package: real ones, of 1.1.1 made here and of 1.0.x kept beside this file.

checkpoints/adam_mini_1.0.{0,5}.pt come from those releases: ``Llama(vocab=7, dim=8, layers=1, n_heads=2, n_kv_heads=2,
hidden=12)``, lr 1e-2, betas (0.9, 0.95), weight decay 0.1, dim=8, n_heads=2, ``batch(7, seed)`` of seeds 0 to 2; beside
the optimizer's state and the weights then, the weights after the seeds 3 to 5.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from adam_mini import Adam_mini
from optimizer import AdamMini, Rules, tag
from tests.optimizer.models import Llama, train
from tests.optimizer.states import refused

KEPT = Path(__file__).with_name("checkpoints")
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
EMBEDDINGS = {"TOKEN_EMBEDDING": "ELEMENT", "HEAD": "ELEMENT"}


def theirs(package: ModuleType, model: nn.Module, kv: int = 4) -> torch.optim.Optimizer:
    named = model.named_parameters()
    return package.Adam_mini(named, dim=16, n_heads=4, n_kv_heads=kv, verbose=False, **OPTIONS)


DOORS = {
    "AdamMini(model)": lambda m: AdamMini(m),
    "AdamMini(named_parameters)": lambda m: AdamMini(m.named_parameters(), weight_decay=0.7),
    "AdamMini(parameters)": lambda m: AdamMini(m.parameters()),
    "Adam_mini": lambda m: Adam_mini(m.named_parameters()),
    "Adam_mini(list)": lambda m: Adam_mini(list(m.named_parameters()), dim=16, n_heads=4, n_kv_heads=2),
}


@pytest.mark.parametrize("door", ["AdamMini(model)", "Adam_mini", "Adam_mini(list)"])
def test_training_goes_on_as_in_the_package(published: ModuleType, door: str) -> None:
    """Three steps there, three more on both sides: the same weights."""
    model, twin = Llama(n_kv_heads=2), Llama(n_kv_heads=2, seed=1)
    opt = theirs(published, model, kv=2)
    train(model, opt, range(3))
    twin.load_state_dict(model.state_dict())
    ours = DOORS[door](twin)
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(group["betas"] == (0.9, 0.95) and group["lr"] == 1e-2 for group in ours.param_groups)
    assert sorted(group["weight_decay"] for group in ours.param_groups) == [0.0, 0.1]
    assert not {"name", "beta1", "beta2"} & set(ours.param_groups[0])
    train(model, opt, range(3, 6))
    train(twin, ours, range(3, 6))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_it(published: ModuleType, door: str) -> None:
    model = Llama(n_kv_heads=2)
    opt = theirs(published, model, kv=2)
    train(model, opt, range(3))
    ours = DOORS[door](model)
    ours.load_state_dict(opt.state_dict())
    for group in opt.param_groups:
        (p,), m = group["params"], opt.state[group["params"][0]]["m"]
        assert torch.equal(ours.state[p]["exp_avg"], m.view_as(p))
        assert ours.state[p]["exp_avg"].data_ptr() != m.data_ptr()


def test_names_not_positions(published: ModuleType) -> None:
    """Their one group per tensor, in another order."""
    model = Llama()
    opt = theirs(published, model)
    train(model, opt, range(1))
    ours = AdamMini(list(reversed(list(tag(model).named_parameters()))))
    ours.load_state_dict(opt.state_dict())
    norm, first = model.norm.weight, model.tok_embeddings.weight
    assert torch.equal(ours.state[norm]["exp_avg"], opt.state[norm]["m"])
    assert torch.equal(ours.state[first]["exp_avg_sq"], opt.state[first]["vmean"])
    refused(AdamMini(Llama(layers=3)), opt.state_dict(), "lacks 9 of this optimizer's parameters")


@pytest.mark.parametrize("door", [AdamMini, Adam_mini])
@pytest.mark.parametrize("kv", [4, 2])
def test_half_heads_are_refused_and_convert_to_their_means(published: ModuleType, kv: int, door) -> None:
    """With head_dim != dim / n_heads the package cut heads in half: not our blocks, but unions of theirs are."""
    model = Llama(n_heads=4, n_kv_heads=kv, head_dim=8)
    opt = theirs(published, model, kv)
    train(model, opt, range(3))
    ours = AdamMini(model)
    words = r"published adam-mini package.*rules 'adam_mini'.*wq\.weight.*vmean of shape \(8, 1\).*but 4 blocks.*"
    r"\(and 3 more"
    refused(ours, opt.state_dict(), words)
    ours.load_state_dict(opt.state_dict(), convert=True)
    wq = model.layers[0].attention.wq.weight
    expected = opt.state[wq]["vmean"].view(4, 2).mean(1)
    torch.testing.assert_close(ours.state[wq]["exp_avg_sq"].view(4, 8)[:, 0], expected)
    train(model, ours, range(1))


def test_a_head_that_ends_inside_a_row_converts_by_its_share() -> None:
    """6 rows of 4 elements kept as 4 chunks of 6: each row's mean over its elements."""
    p = nn.Parameter(torch.randn(6, 4))
    ours = AdamMini([("layers.0.mlp.w1.weight", p)])
    vmean = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    state = {"m": torch.randn(4, 6), "vmean": vmean, "step": 2, "head_per_gpu": 4}
    group = {"name": "layers.0.mlp.w1.weight", "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "params": [0]}
    document = {"state": {0: state}, "param_groups": [group]}
    refused(ours, document, "vmean of shape")
    ours.load_state_dict(document, convert=True)
    expected = vmean.expand(4, 6).reshape(6, 4).mean(1, keepdim=True)
    torch.testing.assert_close(ours.state[p]["exp_avg_sq"], expected)
    assert torch.equal(ours.state[p]["exp_avg"], state["m"].view(6, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vmean": torch.ones(5, 1)}, "5 values, which do not divide"),
        ({"m": torch.ones(2, 6)}, "m of .* has 12 elements"),
        ({"step": None}, "step of"),
        ({"vmean": 1.0}, "vmean of .* is a float"),
    ],
)
def test_states_of_several_ranks_and_broken_ones_are_refused(change: dict[str, Any], words: str) -> None:
    p = nn.Parameter(torch.randn(6, 4))
    ours = AdamMini([("w1.weight", p)])
    state = {"m": torch.randn(6, 4), "vmean": torch.ones(6, 1), "step": 2, **change}
    group = {"name": "w1.weight", "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "params": [0]}
    refused(ours, {"state": {0: state}, "param_groups": [group]}, words, convert=True)


KEPT_RULES = {
    "1.0.0": Rules("as 1.0.0", {**Rules("adam_mini_v1_0").units, **EMBEDDINGS}),
    "1.0.5": Rules("as 1.0.5", {**EMBEDDINGS, "VALUE": "ATTENTION_HEAD"}),
}


@pytest.mark.parametrize("version", KEPT_RULES)
def test_the_first_releases_go_on_under_rules_of_their_partition(version: str) -> None:
    kept = torch.load(KEPT / f"adam_mini_{version}.pt", weights_only=True)
    model = Llama(vocab=7, dim=8, layers=1, n_heads=2, n_kv_heads=2, hidden=12)
    model.load_state_dict(kept["model"])
    refused(AdamMini(model), kept["optimizer"], r"published adam-mini package.*tok_embeddings.*v of shape \(7, 8\)")
    ours = AdamMini(model, rules=KEPT_RULES[version])
    ours.load_state_dict(kept["optimizer"])
    train(model, ours, range(3, 6), vocab=7)
    for name, p in model.named_parameters():
        wanted = kept["three steps later"][name]
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("version", KEPT_RULES)
def test_the_first_releases_convert_to_the_paper_rules(version: str) -> None:
    kept = torch.load(KEPT / f"adam_mini_{version}.pt", weights_only=True)
    model = Llama(vocab=7, dim=8, layers=1, n_heads=2, n_kv_heads=2, hidden=12)
    ours = AdamMini(model)
    ours.load_state_dict(kept["optimizer"], convert=True)
    v = kept["optimizer"]["state"][0]["v"]
    torch.testing.assert_close(ours.state[model.tok_embeddings.weight]["exp_avg_sq"], v.mean(1, keepdim=True))
    train(model, ours, range(1), vocab=7)
