"""Roles and layouts of whole models, against block ids written out by hand from each model's own definition."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from optimizer import AdamMini, Role, Rules, Unit, explain, partition, tag
from optimizer.partition import discover
from optimizer.partition.names import clean
from tests.optimizer.models import GPT, Llama, wrap_compiled


def per(length: int, count: int) -> list[int]:
    """Block of every index for ``count`` runs of ``length``."""
    return [i for i in range(count) for _ in range(length)]


def ids(model: nn.Module, name: str, rules: str | Rules = "adam_mini") -> Tensor:
    parameter = dict(model.named_parameters())[name]
    return partition(model, rules)[name].block_ids(parameter.shape)


def along(block_ids: Tensor, axis: int) -> list[int]:
    """Ids along an axis, having checked that they do not depend on the other one."""
    lines = block_ids.movedim(axis, 0).reshape(block_ids.shape[axis], -1)
    assert bool((lines == lines[:, :1]).all())
    return lines[:, 0].tolist()


def check_llama(model: nn.Module, names: dict[str, str], heads: int, kv: int, hd: int) -> None:
    shape = {name: p.shape for name, p in model.named_parameters()}
    assert along(ids(model, names["q"]), 0) == per(hd, heads)
    assert along(ids(model, names["k"]), 0) == per(hd, kv)
    for key in ("v", "o", "up", "down", "embedding", "head"):
        assert along(ids(model, names[key]), 0) == list(range(shape[names[key]][0])), key
    assert partition(model)[names["norm"]].n_blocks == 1
    assert not [name for name, anatomy in discover(model).items() if not anatomy.recognised]


@pytest.mark.parametrize(("heads", "kv", "hd"), [(4, 4, 4), (6, 2, 5), (3, 1, 8)])
def test_meta_llama(heads: int, kv: int, hd: int) -> None:
    model = Llama(n_heads=heads, n_kv_heads=kv, head_dim=hd)
    layer = "layers.1."
    check_llama(
        model,
        {"q": layer + "attention.wq.weight", "k": layer + "attention.wk.weight", "v": layer + "attention.wv.weight",
         "o": layer + "attention.wo.weight", "up": layer + "feed_forward.w3.weight",
         "down": layer + "feed_forward.w2.weight", "embedding": "tok_embeddings.weight", "head": "output.weight",
         "norm": layer + "ffn_norm.weight"},
        heads, kv, hd,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv", "hd"), [(4, 2, 12), (5, 1, 6)])
def test_transformers_llama(heads: int, kv: int, hd: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=hd, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    layer = "model.layers.0."
    check_llama(
        LlamaForCausalLM(config),
        {"q": layer + "self_attn.q_proj.weight", "k": layer + "self_attn.k_proj.weight",
         "v": layer + "self_attn.v_proj.weight", "o": layer + "self_attn.o_proj.weight",
         "up": layer + "mlp.up_proj.weight", "down": layer + "mlp.down_proj.weight",
         "embedding": "model.embed_tokens.weight", "head": "lm_head.weight",
         "norm": layer + "input_layernorm.weight"},
        heads, kv, hd,
    )  # fmt: skip


def test_nano_gpt_fused_rows() -> None:
    model = GPT(dim=12, n_head=3)
    block_ids = ids(model, "transformer.h.0.attn.c_attn.weight")
    assert along(block_ids, 0) == per(4, 3) + [3 + i for i in per(4, 3)] + list(range(6, 18))
    assert ids(model, "transformer.h.0.attn.c_attn.bias").tolist() == list(range(36))
    short = ids(model, "transformer.h.0.attn.c_attn.weight", "short_run")
    assert along(short, 0) == per(4, 6) + [6] * 12
    assert partition(model, "pytorch_default")["transformer.h.0.attn.c_attn.weight"].n_blocks == 1
    roles = discover(model)
    assert roles["transformer.wpe.weight"].role is Role.POSITION_EMBEDDING
    assert roles["transformer.h.0.mlp.c_proj.weight"].role is Role.MLP_OUT
    assert roles["transformer.h.0.attn.c_proj.weight"].role is Role.ATTENTION_OUT
    assert roles["lm_head.weight"].role is Role.HEAD


def test_transformers_gpt2_is_by_columns() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=20, n_layer=1, n_head=5, bos_token_id=0, eos_token_id=1,
        add_cross_attention=True,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    layer = "transformer.h.0."
    assert along(ids(model, layer + "attn.c_attn.weight"), 1) == per(4, 10) + list(range(10, 30))
    assert along(ids(model, layer + "crossattention.c_attn.weight"), 1) == per(4, 5) + list(range(5, 25))
    assert along(ids(model, layer + "crossattention.q_attn.weight"), 1) == per(4, 5)
    assert along(ids(model, layer + "mlp.c_fc.weight"), 1) == list(range(80))
    assert along(ids(model, layer + "mlp.c_fc.weight", "slim_adam"), 0) == list(range(20))
    assert discover(model)["transformer.wte.weight"].role is Role.TOKEN_EMBEDDING, "tied with lm_head: the embedding"


def test_multihead_attention_in_all_its_forms() -> None:
    plain = nn.MultiheadAttention(12, 3, add_bias_kv=True)
    assert along(ids(plain, "in_proj_weight"), 0) == per(4, 6) + list(range(6, 18))
    assert partition(plain)["bias_k"].n_blocks == 12
    apart = nn.MultiheadAttention(12, 3, kdim=5, vdim=7)
    assert along(ids(apart, "q_proj_weight"), 0) == along(ids(apart, "k_proj_weight"), 0) == per(4, 3)
    assert along(ids(apart, "v_proj_weight"), 0) == list(range(12))
    layer = nn.TransformerEncoderLayer(12, 3, 20)
    assert along(ids(layer, "self_attn.in_proj_weight"), 0)[:12] == per(4, 3)
    assert discover(layer)["linear2.weight"].role is Role.MLP_OUT
    assert partition(layer)["norm1.weight"].n_blocks == 1


def test_mlp_and_cnn() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)
    )
    assert partition(model)["0.weight"].n_blocks == 4 and partition(model)["1.weight"].n_blocks == 1
    assert along(ids(model, "2.weight"), 1) == list(range(6)), "transposed: output channels on axis 1"
    assert partition(model)["4.weight"].n_blocks == 5 and partition(model)["4.bias"].n_blocks == 5
    assert partition(model, "slim_adam")["4.weight"].n_blocks == 24


def test_every_door_gives_the_same_partition() -> None:
    model = Llama(n_heads=6, n_kv_heads=2, head_dim=5)
    names = [name for name, _ in model.named_parameters()]
    expected = partition(model)

    def layouts(optimizer: AdamMini) -> dict[int, object]:
        return {
            id(p): layout
            for group, row in zip(optimizer.param_groups, optimizer.layouts, strict=True)
            for p, layout in zip(group["params"], row, strict=True)
        }

    wanted = {id(p): expected[name] for name, p in model.named_parameters()}
    assert layouts(AdamMini(model)) == wanted
    assert layouts(AdamMini(model.named_parameters())) == wanted
    assert layouts(AdamMini(model.parameters())) == wanted
    tag(model)
    assert layouts(AdamMini(list(model.parameters()))) == wanted
    assert layouts(AdamMini([{"params": list(model.parameters())}])) == wanted
    assert layouts(AdamMini([{"params": list(model.named_parameters())}])) == wanted
    assert set(expected) == set(names)


def test_frozen_parameters_are_described_but_not_trained() -> None:
    model = Llama()
    model.tok_embeddings.requires_grad_(False)
    assert "tok_embeddings.weight" in partition(model)
    trained = {name for group in AdamMini(model).param_groups for name in group["param_names"]}
    assert "tok_embeddings.weight" not in trained and "output.weight" in trained


class Strange(nn.Module):
    """An attention of nobody's, and a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer_attention = nn.Module()
        self.table = nn.Parameter(torch.zeros(4, 6))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(8, 24)


def test_the_unknown_is_named_once_and_strict_raises(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Strange(), FusedAttention())
    with caplog.at_level(logging.WARNING, logger="optimizer"):
        optimizer = AdamMini(model)
    assert len(caplog.records) == 1
    assert "0.table" in caplog.text and "1.query_key_value.weight" in caplog.text and "tag(model)" in caplog.text
    assert optimizer.layouts[0][0].n_blocks == 1
    with pytest.raises(ValueError, match=r"0\.table"):
        AdamMini(model, strict=True)
    finer = AdamMini(model, rules=Rules("adam_mini").replace("mine", {"OTHER": Unit.ELEMENT}))
    assert finer.layouts[0][0].n_blocks == 24
    text = explain(model)
    assert text.splitlines()[2].startswith("! "), "the unrecognised come first"


def test_a_config_that_contradicts_the_weights_names_both_numbers() -> None:
    model = Llama(n_heads=4, n_kv_heads=4, head_dim=4)
    model.layers[0].attention.n_heads = 5
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq\.weight.*5 heads.*20 rows.*16 rows"):
        partition(model)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"forward pass"):
        partition(nn.Sequential(nn.LazyLinear(4)))


def test_explain_and_wrapped_models() -> None:
    model = Llama()
    text = explain(model, "short_run")
    assert "layers.{0..1}.attention.wq.weight" in text and "ATTENTION_HEAD" in text and "TENSOR" in text
    compiled = wrap_compiled(model)
    assert {clean(name): layout for name, layout in partition(compiled).items()} == partition(model)


def test_the_shell_command(capsys: pytest.CaptureFixture[str]) -> None:
    from optimizer.__main__ import main

    main(["explain", "tests.optimizer.models:GPT", "--rules", "slim_adam"])
    assert "c_attn" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="module:attribute"):
        main(["explain", "nonsense"])
