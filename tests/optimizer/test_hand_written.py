"""Attentions of tutorials and other people's code: names, head counts and shapes nobody declared.

Each is proven from its gradients, whatever way of attending it uses, and its mistakes are contradicted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from optimizer import partition
from optimizer.partition import discover
from optimizer.tools.verify import Verdict, verify

NAMES = [("W_q", "W_k", "W_v"), ("Wq", "Wk", "Wv"), ("q_linear", "k_linear", "v_linear"), ("queries", "keys", "values"),
         ("c_q", "c_k", "c_v"), ("w_qs", "w_ks", "w_vs"), ("to_q", "to_k", "to_v"), ("query", "key", "value"),
         ("linear_Q", "linear_K", "linear_V"), ("fc_q", "fc_k", "fc_v")]  # fmt: skip


class Mixing(nn.Module):
    """Grouped attention under any names, in a class that does not call itself attention."""

    def __init__(self, names: tuple[str, ...], heads: int = 6, groups: int = 2, dim: int = 5, said: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(n_heads=said or heads, n_kv_heads=groups, head_dim=heads * dim // (said or heads))
        self._shape, self._names = (heads, groups, dim), names
        for name, count in zip(names, (heads, groups, groups), strict=True):
            setattr(self, name, nn.Linear(12, count * dim, bias=False))
        self.out = nn.Linear(heads * dim, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads, groups, dim = self._shape
        q, k, v = (getattr(self, n)(x).unflatten(-1, (-1, dim)).transpose(1, 2) for n in self._names)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("names", NAMES, ids="/".join)
def test_names_that_differ_in_one_letter(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Mixing(names)
    layouts = partition(model)
    assert [layouts[f"{name}.weight"].n_blocks for name in names] == [6, 2, 10]
    report = verify(model)
    assert len(report.of(Verdict.PROVEN)) == 3 == len(report.findings), str(report)


@pytest.mark.parametrize("said", [3, 2, 12])
def test_heads_claimed_too_coarse_or_too_fine_are_contradicted(said: int) -> None:
    """Also under torch's own attention kernels, which have no second derivative."""
    torch.manual_seed(0)
    model = Mixing(("q_proj", "k_proj", "v_proj"), heads=6, groups=6, dim=4, said=said)
    model.config.n_kv_heads = said
    assert verify(model).contradicted


class Head(nn.Module):
    """One head of its own, as in tutorials."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)


class Heads(nn.Module):
    """Heads side by side in a list."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.num_heads = count
        self.heads = nn.ModuleList(Head(width, width // count) for _ in range(count))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


@pytest.mark.parametrize(("count", "width"), [(4, 64), (6, 384), (3, 12)])
def test_a_list_of_single_heads(count: int, width: int) -> None:
    layouts = partition(nn.Sequential(Heads(count, width)))
    assert layouts["0.heads.0.query.weight"].n_blocks == layouts["0.heads.0.key.weight"].n_blocks == 1
    assert layouts["0.heads.0.value.weight"].n_blocks == width // count
    if width < 64:
        torch.manual_seed(0)
        assert not verify(Heads(count, width)).contradicted


def _of(name: str, config: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


def test_xlnet_keeps_in_head_dim() -> None:
    model = _of("XLNetLMHeadModel", "XLNetConfig", vocab_size=64, d_model=24, n_head=4, n_layer=1, d_inner=20)
    weight = "transformer.layer.0.rel_attn."
    ids = {name: partition(model)[weight + name].block_ids((24, 4, 6)) for name in "qkro"}
    for name in "qkr":
        assert torch.equal(ids[name], torch.arange(4)[:, None].expand(24, 4, 6)), name
    assert torch.equal(ids["o"], torch.arange(24)[:, None, None].expand(24, 4, 6))
    assert all(a.recognised for a in discover(model).values())


def test_lxmert_calls_all_heads_head_size() -> None:
    model = _of("LxmertModel", "LxmertConfig", vocab_size=64, hidden_size=36, num_attention_heads=3,
                intermediate_size=20, l_layers=1, x_layers=1, r_layers=1)  # fmt: skip
    queries = [n for n in partition(model) if n.endswith("query.weight")]
    assert queries and all(partition(model)[n].n_blocks == 3 for n in queries)


def test_deberta_with_positions_of_its_own() -> None:
    model = _of("DebertaV2Model", "DebertaV2Config", vocab_size=64, hidden_size=30, num_attention_heads=5,
                intermediate_size=20, num_hidden_layers=1, relative_attention=True, pos_att_type=["c2p", "p2c"],
                share_att_key=False, max_relative_positions=8)  # fmt: skip
    layouts = partition(model)
    assert all(layouts[f"encoder.layer.0.attention.self.pos_{n}_proj.weight"].n_blocks == 5 for n in ("key", "query"))
    assert not verify(model).contradicted


def test_groupvit_assigns_with_one_head() -> None:
    config = transformers.GroupViTVisionConfig(
        hidden_size=21, num_attention_heads=7, intermediate_size=20, image_size=32, patch_size=8, depths=[1, 1, 1],
        num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 0],
    )  # fmt: skip
    layouts = partition(transformers.GroupViTVisionModel(config))
    assigned = {n: x.n_blocks for n, x in layouts.items() if n.endswith("downsample.assign.q_proj.weight")}
    assert assigned and set(assigned.values()) == {1}


class Together(nn.Module):
    """One projection of a name that stands for several orders, here a head's query, key and value side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.qkv, self.out = 3, nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 12)).transpose(1, 2).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_was_not_recognised_is_looked_at() -> None:
    """In a class that does not call itself attention, too."""
    torch.manual_seed(0)
    assert [finding.name for finding in verify(Together(), inputs=(torch.randn(2, 5, 12),)).contradicted] == [
        "qkv.weight"
    ]
