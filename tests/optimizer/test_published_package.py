"""``from adam_mini import Adam_mini``: every way it is built in the wild, and the published package beside it.

The published 1.1.1 is installed outside the import path (its name is this project's, too) and loaded from there.
"""

from __future__ import annotations

import itertools
import logging
import math
import pickle
from types import ModuleType

import pytest
import torch
from torch import nn

import optimizer
from adam_mini import Adam_mini
from optimizer import AdamMini, partition
from tests.optimizer.models import GPT, Llama, batch, loss_of, train


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
    train(ours, Adam_mini(named_parameters=named, **options), range(20))
    train(theirs, published.Adam_mini(named_parameters=theirs.named_parameters(), verbose=False, **options), range(20))
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
    assert "layers.0.attention.wq.weight" in caplog.text


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
    train(model, opt, range(2))
    again = Llama()
    again.load_state_dict(model.state_dict())
    resumed = Adam_mini(again.named_parameters(), lr=1e-2, dim=16, n_heads=4)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    train(model, opt, range(2, 4))
    train(again, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert pickle.loads(pickle.dumps(opt)).wqk_names == opt.wqk_names


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = Llama()
        train(model, Adam_mini(model.named_parameters(), dim=16, n_heads=4, verbose=True), range(1))
    assert capsys.readouterr() == ("", "")


class Blocks(nn.Module):
    """Names that the published package knows by substring, and no module of which says more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {
            "block_feed_forward_in": (8, 6), "block_mlp_inner": (6, 8), "linear_mix": (6, 6),
            "adapter_output_mix": (6, 6), "my_wv_matrix": (6, 6), "embed_extra": (6, 6),
            "odd_bias_table": (6, 6), "odd": (6, 6), "wqkv_all": (6, 6),
        }  # fmt: skip
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights.values():
            x = torch.tanh(x @ weight.T)
        return x.square().sum()


FORMS = {
    "named_parameters": lambda model: model.named_parameters(),
    "model": lambda model: model,
    "list": lambda model: list(model.named_parameters()),
    "filtered generator": lambda model: ((name, p) for name, p in model.named_parameters() if p.requires_grad),
    "iterator": lambda model: iter(list(model.named_parameters())),
    "items": lambda model: dict(model.named_parameters()).items(),
    "chain": lambda model: itertools.chain(model.named_parameters(), []),
    "lists as pairs": lambda model: [[name, p] for name, p in model.named_parameters()],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_published_blocks(published: ModuleType, form: str) -> None:
    ours, theirs = Blocks(), Blocks()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "dim": 6, "n_heads": 2}
    optimizers = [
        (ours, Adam_mini(FORMS[form](ours), **options)),
        (theirs, published.Adam_mini(theirs.named_parameters(), verbose=False, **options)),
    ]
    for model, opt in optimizers:
        for step in range(5):
            model(torch.randn(7, 6, generator=torch.Generator().manual_seed(step))).backward()
            opt.step()
            opt.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    found = layouts(optimizers[0][1])
    assert found["weights.odd_bias_table"].n_blocks == 36 and found["weights.odd"].n_blocks == 1  # type: ignore[attr-defined]


PARTS = ["blocks.0.mlp.0.weight", "encoder.feed_forward.dense.weight", "linear.weight", "linears.3.weight", "linear",
         "self_attn.wv", "values.weight", "embedder.weight", "embeddings.norm.weight", "wte", "final_layer.0.weight",
         "outputs", "attn.proj.weight", "attention.wo.weight", "attn.to_q.weight", "linear_attn.to_q.weight",
         "layers.0.mlp.query_proj.weight", "qkv_proj.weight", "wqkv.weight", "query", "key", "keys.weight",
         "q_proj.lora_A.weight", "rel_bias_table", "bias_scale", "mlp.bias", "rel_bias.weight", "mlp.norm.weight",
         "ln_f.weight", "scale", "conv.weight", "mlp.wpe.weight", "MLP.Up.Weight", "module.mlp.weight",
         "mlp_ln.weight"]  # fmt: skip
SHAPES = [
    (),
    (4,),
    (8,),
    (16,),
    (32,),
    (8, 8),
    (4, 8),
    (8, 4),
    (16, 8),
    (8, 16),
    (12, 6),
    (6, 12),
    (8, 2, 4),
    (4, 4, 4),
]
CHANGES = {
    "as they are": {},
    "added": {
        "mlp_names": {"feed_forward", "linear", "mlp", "scale", "conv", "ln_f"},
        "wqk_names": {"wq", "mlp", "conv"},
    },
    "emptied": {"mlp_names": set(), "output_names": set(), "embd_names": ()},
    "biases emptied": {"adam_block_names": set()},
    "adam for more": {"adam_block_names": {"bias", "scale", "wv", "lora", "linear"}},
    "replaced": {"wv_names": {"to_q", "qkv"}, "wqk_names": {"linears", "rel"}, "attn_proj_names": ["wte"]},
}


def published_blocks(state: dict, shape: tuple[int, ...]) -> torch.Tensor:
    """The block of every element, read off the published package's state."""
    if "v" in state:
        return torch.arange(math.prod(shape)).reshape(shape)
    ids = torch.arange(state["vmean"].numel())
    return ids.repeat_interleave(math.prod(shape) // max(1, len(ids))).reshape(shape)


@pytest.mark.parametrize("change", CHANGES)
def test_names_alone_never_share_more_than_the_published_package_unsaid(
    published: ModuleType, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every name and shape that it takes a step with; one that fails there has no blocks to compare with."""
    accepted = said = 0
    for name, shape in itertools.product(PARTS, SHAPES):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        options = {"dim": 8, "n_heads": 4, "n_kv_heads": 2}
        opts = [Adam_mini([(name, ours)], **options), published.Adam_mini([(name, theirs)], verbose=False, **options)]
        for opt in opts:
            for key, value in CHANGES[change].items():
                setattr(opt, key, value)
        theirs.grad = torch.ones(shape)
        try:
            opts[1].step()
        except (RuntimeError, IndexError):
            continue
        caplog.clear()
        try:
            (found,) = layouts(opts[0]).values()
        except ValueError as error:
            assert "heads do not divide" in str(error)
            said += 1
            continue
        accepted += 1
        blocks = found.block_ids(shape).flatten()  # type: ignore[attr-defined]
        expected = published_blocks(opts[1].state[theirs], shape).flatten()
        pairs = torch.stack([blocks, expected]).unique(dim=1).shape[1]
        if pairs != len(blocks.unique()):
            said += 1
            assert "share more than in the published package" in caplog.text, (name, shape)
    assert accepted > 200 and said < accepted / 10


def test_what_nobody_knows_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ParameterDict({"odd": torch.ones(4, 4), "mlp": torch.ones(4, 4)})
    opt = Adam_mini(list(model.named_parameters()), dim=4, n_heads=2)
    for _ in range(2):
        opt.state_bytes()
    assert len(caplog.messages) == 1 and "odd (4, 4)" in caplog.text and "mlp" not in caplog.text
