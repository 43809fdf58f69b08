"""``from adam_mini import Adam_mini``: every way it is built in the wild, and the published package beside it.

The published 1.1.1 is installed outside the import path (its name is this project's, too) and loaded from there.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import optimizer
from adam_mini import Adam_mini
from optimizer import AdamMini, partition
from tests.optimizer.models import GPT, Llama, batch, loss_of

PUBLISHED = Path(sys.prefix) / "published" / "adam_mini" / "__init__.py"


@pytest.fixture(scope="module")
def published() -> ModuleType:
    assert PUBLISHED.is_file(), f"{PUBLISHED} is missing: `make setup` installs the published package there"
    spec = importlib.util.spec_from_file_location(
        "published_adam_mini", PUBLISHED, submodule_search_locations=[str(PUBLISHED.parent)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published_adam_mini"] = module
    spec.loader.exec_module(module)
    return module


def train(model: nn.Module, opt: torch.optim.Optimizer, vocab: int, steps: int = 20) -> None:
    for step in range(steps):
        loss_of(model, batch(vocab, step)).backward()
        opt.step()
        opt.zero_grad()


def hf_llama(kv: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=kv, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("known", [True, False], ids=["from the model", "from names"])
@pytest.mark.parametrize("make", [lambda kv: Llama(n_kv_heads=kv), hf_llama], ids=["meta", "transformers"])
def test_agrees_with_the_published_package(published: ModuleType, make, kv: int, known: bool) -> None:
    """20 steps, every parameter, with and without grouped heads, where head_dim = dim / n_heads: where it is right."""
    ours, theirs = make(kv), make(kv)
    options = {
        "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "dim": 16, "n_heads": 4, "n_kv_heads": kv,
    }  # fmt: skip
    named = ours.named_parameters() if known else list(ours.named_parameters())
    train(ours, Adam_mini(named_parameters=named, **options), 11)
    train(theirs, published.Adam_mini(named_parameters=theirs.named_parameters(), verbose=False, **options), 11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_published_package_is_wrong_where_ours_is_not(published: ModuleType) -> None:
    """The negative control: with head_dim != dim / n_heads the published package cuts heads in half, silently."""
    model = Llama(n_heads=4, n_kv_heads=4, head_dim=8)
    theirs = published.Adam_mini(model.named_parameters(), dim=16, n_heads=4, verbose=False)
    ours = Adam_mini(model.named_parameters(), dim=16, n_heads=4)
    loss_of(model, batch(11, 0)).backward()
    theirs.step()
    ours.step()
    wq = model.layers[0].attention.wq.weight
    assert theirs.state[wq]["vmean"].numel() == 8
    assert ours.state[wq]["exp_avg_sq"].unique().numel() == 4


def layouts(opt: AdamMini) -> dict[str, object]:
    opt.state_bytes()
    return {
        name: layout
        for group, row in zip(opt.param_groups, opt.layouts, strict=True)
        for name, layout in zip(group["param_names"], row, strict=True)
    }


def test_every_way_of_building_it() -> None:
    model = Llama(n_kv_heads=2)
    expected = partition(model)
    assert layouts(Adam_mini(model.named_parameters(), 1e-3, (0.9, 0.999), 1e-8, 0.0)) == expected
    assert layouts(Adam_mini(model, lr=1e-3)) == expected
    assert layouts(Adam_mini(named_parameters=model.named_parameters(), dim=None, n_heads=None, n_kv_heads=None,
                             model_sharding=True, verbose=False)) == expected  # fmt: skip
    assert layouts(Adam_mini(list(model.named_parameters()), dim=16, n_heads=4, n_kv_heads=2)) == expected
    optimizer.tag(model)
    assert layouts(Adam_mini(list(model.named_parameters()), dim=None, n_heads=None, n_kv_heads=None)) == expected


def test_unknown_heads_are_said_and_safe(caplog: pytest.LogCaptureFixture) -> None:
    """Names alone and numbers None: one scalar per row of a query, never a coarser guess."""
    model = Llama()
    opt = Adam_mini(list(model.named_parameters()), dim=None, n_heads=None)
    assert layouts(opt)["layers.0.attention.wq.weight"].n_blocks == 16  # type: ignore[attr-defined]


@pytest.mark.parametrize("empty", [lambda s: {}, lambda s: s.clear() or s, lambda s: set()])
def test_emptied_value_names_mean_one_scalar_per_value_matrix(empty) -> None:
    for model, name in ((Llama(), "layers.0.attention.wv.weight"), (GPT(), "transformer.h.0.attn.c_attn.weight")):
        opt = Adam_mini(model.named_parameters(), dim=16, n_heads=4)
        opt.wv_names = empty(opt.wv_names)
        assert layouts(opt) == partition(model, "short_run")
        assert layouts(opt)[name] != partition(model)[name]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(8, 12, bias=False)
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x).sum() + (x @ self.table.T).sum()


def test_added_names_claim_parameters() -> None:
    model = Odd()
    opt = Adam_mini(model.named_parameters(), dim=8, n_heads=2)
    opt.wqk_names.add("mixer")
    opt.mlp_names.add("table")
    found = layouts(opt)
    assert found["mixer.weight"].n_blocks == 3 and found["table"].n_blocks == 6  # type: ignore[attr-defined]
    model(torch.ones(1, 8)).backward()
    opt.step()
    assert opt.state[model.table]["exp_avg_sq"].shape == (6, 1)


def test_adam_block_names_emptied() -> None:
    model = GPT()
    opt = Adam_mini(model, dim=12, n_heads=3)
    opt.adam_block_names = set()
    assert layouts(opt)["transformer.h.0.mlp.c_fc.bias"].n_blocks == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads=4.*n_heads=6"), ({"n_heads": 0}, "n_heads=0"),
        ({"dim": -3}, "dim=-3"), ({"lr": -1.0}, "lr=-1"), ({"eps": float("nan")}, "eps=nan"),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Adam_mini(Llama().named_parameters(), **options)


def test_heads_that_do_not_divide_are_named_at_the_first_step() -> None:
    model = Llama()
    opt = Adam_mini(list(model.named_parameters()), dim=16, n_heads=5)
    loss_of(model, batch(11, 0)).backward()
    before = model.output.weight.detach().clone()
    with pytest.raises(ValueError, match=r"wq.*16 rows.*5 heads"):
        opt.step()
    assert torch.equal(model.output.weight, before)


def test_resume_and_pickle() -> None:
    model = Llama()
    opt = Adam_mini(model.named_parameters(), lr=1e-2, dim=16, n_heads=4)
    train(model, opt, 11, 2)
    again = Llama()
    again.load_state_dict(model.state_dict())
    resumed = Adam_mini(again.named_parameters(), lr=1e-2, dim=16, n_heads=4)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    train(model, opt, 11, 2)
    train(again, resumed, 11, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert pickle.loads(pickle.dumps(opt)).wqk_names == opt.wqk_names


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = Llama()
        train(model, Adam_mini(model.named_parameters(), dim=16, n_heads=4, verbose=True), 11, 1)
    assert capsys.readouterr() == ("", "")
