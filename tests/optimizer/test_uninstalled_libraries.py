"""Layouts of libraries that are not installed here, on stand-ins with their names and documented shapes.

What these tests cannot see: whether the libraries still are as their documentation or source said.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optimizer import partition
from optimizer.partition import discover
from optimizer.tools.verify import Verdict, verify

HEADS, GROUPS, DIM, WIDTH = 6, 2, 4, 20


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped attention over [batch, position, head, dim]."""
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def by_group(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    each = fused.unflatten(-1, (GROUPS, HEADS // GROUPS + 2, DIM))
    return each[:, :, :, :-2].flatten(2, 3), each[:, :, :, -2], each[:, :, :, -1]


def by_kind(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = fused.split([HEADS * DIM, GROUPS * DIM, GROUPS * DIM], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in parts)
    return q, k, v


class Base(nn.Module):
    """An attention with one fused projection."""

    fused, back, split = "", "", staticmethod(by_kind)

    def __init__(self) -> None:
        super().__init__()
        setattr(self, self.fused, nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * DIM, bias=False))
        setattr(self, self.back, nn.Linear(HEADS * DIM, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.back)(attend(*type(self).split(getattr(self, self.fused)(x))))


class SelfAttention(Base):
    """Megatron core's names."""

    fused, back, split = "linear_qkv", "linear_proj", staticmethod(by_group)
    num_attention_heads, num_query_groups = HEADS, GROUPS


class InternLM2Attention(Base):
    """InternLM2's names."""

    fused, back, split = "wqkv", "wo", staticmethod(by_group)
    num_heads, num_key_value_heads, head_dim = HEADS, GROUPS, DIM


class FastAttention(Base):
    """gpt-fast's names."""

    fused, back = "wqkv", "wo"
    n_head, n_local_heads, head_dim = HEADS, GROUPS, DIM


class LitAttention(Base):
    """litgpt's names."""

    fused, back = "qkv", "proj"
    n_head, n_query_groups, head_size = HEADS, GROUPS, DIM


class EngineAttention(Base):
    """TransformerEngine's names, not interleaved."""

    fused, back = "layernorm_qkv", "proj"
    num_attention_heads, num_gqa_groups, hidden_size_per_attention_head = HEADS, GROUPS, DIM
    qkv_weight_interleaved = False


class InterleavedEngineAttention(EngineAttention):
    """The same, interleaved."""

    split = staticmethod(by_group)
    qkv_weight_interleaved = True


@pytest.mark.parametrize(
    "make",
    [SelfAttention, InternLM2Attention, FastAttention, LitAttention, EngineAttention, InterleavedEngineAttention],
)
def test_fused_projections(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    report = verify(make())
    assert [f.verdict for f in report.findings] == [Verdict.PROVEN], str(report)


class GroupedExperts(nn.Module):
    """torchtitan's experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(3, 10, 4)) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(3, 4, 10))


class GptOssGroupedExperts(nn.Module):
    """torchtitan's GPT-OSS experts, whose bias shows which axis is the output."""

    def __init__(self, inputs_first: bool) -> None:
        super().__init__()
        up, down = ((3, 4, 20), (3, 10, 4)) if inputs_first else ((3, 20, 4), (3, 4, 10))
        self.mlp1_weight, self.mlp1_bias = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(3, 20))
        self.mlp2_weight, self.mlp2_bias = nn.Parameter(torch.zeros(down)), nn.Parameter(torch.zeros(3, 4))


class NamedByAxes(nn.Module):
    """torchtitan 0.3 says each axis in the name: E experts, F or G hidden units, D the model's."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w1_EFD": (3, 10, 4), "w3_EFD": (3, 10, 4), "w2_EDF": (3, 4, 10),
                  "mlp1_weight_EGD": (3, 20, 4), "mlp2_weight_EDF": (3, 4, 10)}  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.mlp1_bias_EG, self.mlp2_bias_ED = nn.Parameter(torch.zeros(3, 20)), nn.Parameter(torch.zeros(3, 4))


class Dense(nn.Module):
    """Projections without biases, by name and number of output units."""

    def __init__(self, says: dict[str, int], **outputs: int) -> None:
        super().__init__()
        for name, value in says.items():
            setattr(self, name, value)
        for name, units in outputs.items():
            setattr(self, name, nn.Linear(5, units, bias=False))


class Attention(Dense):
    """torchtitan's Muse: the projections are a module further down."""


class Qwen35Attention(Dense):
    """torchtitan's Qwen 3.5: a head's query, then its gate."""


class GatedDeltaNet(Dense):
    """torchtitan's linear attention."""


class LayerNormMLP(nn.Module):
    """TransformerEngine's fused norm and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight, self.layer_norm_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.fc1_weight, self.fc2_weight = nn.Parameter(torch.zeros(10, 4)), nn.Parameter(torch.zeros(4, 10))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (GroupedExperts(), {"w1": 30, "w3": 30, "w2": 12}),
        (GptOssGroupedExperts(False), {"mlp1_weight": 60, "mlp2_weight": 12, "mlp1_bias": 60, "mlp2_bias": 12}),
        (GptOssGroupedExperts(True), {"mlp1_weight": 60, "mlp2_weight": 12, "mlp1_bias": 60, "mlp2_bias": 12}),
        (NamedByAxes(), {"w1_EFD": 30, "w3_EFD": 30, "w2_EDF": 12, "mlp1_weight_EGD": 60, "mlp2_weight_EDF": 12,
                         "mlp1_bias_EG": 60, "mlp2_bias_ED": 12}),
        (Attention({}, o_gate=24, wo=20), {"o_gate.weight": 24, "wo.weight": 20}),
        (Qwen35Attention({"n_heads": 6, "n_kv_heads": 2, "head_dim": 4}, wq=48, wk=8, wv=8, wo=20),
         {"wq.weight": 6 + 24, "wk.weight": 2, "wv.weight": 8, "wo.weight": 20}),
        (GatedDeltaNet({"key_head_dim": 4, "value_head_dim": 8}, in_proj_q=8, in_proj_k=8, in_proj_v=16, in_proj_z=16,
                       in_proj_a=2, in_proj_b=2, out_proj=20),
         {"in_proj_q.weight": 2, "in_proj_k.weight": 2, "in_proj_v.weight": 16, "in_proj_z.weight": 16,
          "in_proj_a.weight": 2, "out_proj.weight": 20}),
        (LayerNormMLP(), {"layer_norm_weight": 1, "layer_norm_bias": 4, "fc1_weight": 10, "fc2_weight": 4}),
        (nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), {"weight_ih_l0": 24, "weight_hr_l1_reverse": 3}),
        (nn.GRUCell(4, 6), {"weight_ih": 18, "weight_hh": 18, "bias_ih": 18}),
        (nn.Bilinear(3, 4, 5), {"weight": 5}),
        (nn.Conv1d(6, 6, 3, groups=6), {"weight": 6, "bias": 6}),
    ],
)  # fmt: skip
def test_other_layers(model: nn.Module, expected: dict[str, int]) -> None:
    layouts = partition(model)
    assert {name: layouts[name].n_blocks for name in expected} == expected
    assert all(a.recognised for a in discover(model).values())
    assert all(a.decays for n, a in discover(model).items() if n in ("fc1_weight", "fc2_weight"))


def test_experts_by_what_they_do() -> None:
    """One output unit of one expert is moved by exactly one block, either way round."""
    for first, name in ((False, "mlp1_weight"), (True, "mlp1_weight")):
        model = GptOssGroupedExperts(first)
        weight = getattr(model, name)
        ids = partition(model)[name].block_ids(weight.shape)
        out = torch.einsum("ed,ehd->eh" if not first else "ed,edh->eh", torch.rand(3, 4) + 0.1, weight)
        (grad,) = torch.autograd.grad(out[1, 7], weight)
        assert len(ids[grad != 0].unique()) == 1 and int((grad != 0).sum()) == 4
        assert int((ids == ids[grad != 0][0]).sum()) == 4
