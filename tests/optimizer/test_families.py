"""Every declared architecture: layouts proven from gradients, the rest of the weights against what the layers are.

Guards the table of families, on sizes that give wrong guesses away; and the prover itself, by wrong tables it must
contradict.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from optimizer import partition
from optimizer.partition import Anatomy, Part, Role, discover
from optimizer.partition.families import Context, Family
from optimizer.tools.verify import Verdict, verify
from optimizer.tools.verify.run import is_target
from tests.optimizer.zoo import IMAGES, TEXT, cross_attention_inputs

ALL = {**TEXT, **IMAGES}
WITHOUT_PROOF = {"mamba2"}  # no queries, keys or values


@pytest.mark.parametrize("name", ALL)
def test_every_projection_is_proven(name: str) -> None:
    model = ALL[name]()
    anatomies = discover(model)
    assert [n for n, a in anatomies.items() if len(a.shape) >= 2 and not a.recognised] == []
    if name in WITHOUT_PROOF:
        with pytest.raises(ValueError, match="nothing to verify"):
            verify(model)
        return
    report = verify(model, cross_attention_inputs(model) if "cross" in name else None)
    assert report.contradicted == [], str(report)
    undecided = [f for f in report.of(Verdict.UNDECIDED) if not f.name.endswith("experts.input_linear.weight")]
    assert undecided == [], str(report)
    assert report.of(Verdict.PROVEN)


@pytest.mark.parametrize("name", ALL)
def test_everything_else_has_a_scalar_per_output_unit(name: str) -> None:
    """Counted from the modules alone, without the table."""
    model = ALL[name]()
    anatomies, layouts = discover(model), partition(model)
    checked = 0
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}" if path else leaf
            if full not in anatomies or is_target(full, anatomies[full], model):
                continue  # tied under another name, or proven from gradients
            expected = blocks_by_hand(module, leaf, parameter)
            if expected is not None:
                checked += 1
                assert layouts[full].n_blocks == expected, (full, tuple(parameter.shape), layouts[full])
                assert layouts[full].fits(parameter.shape)
    assert checked > 3


def blocks_by_hand(module: nn.Module, leaf: str, parameter: torch.Tensor) -> int | None:
    """Blocks of a weight that is no query, key or value; None where the layer says nothing."""
    kind, shape = type(module).__name__, tuple(parameter.shape)
    if leaf.endswith("bias"):
        return parameter.numel()
    if "Norm" in kind:
        return 1
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return shape[0]
    if kind == "Conv1D":
        return shape[1]
    if isinstance(module, nn.modules.conv._ConvNd):
        return shape[0]
    if "Router" in kind or "Gate" in kind:
        return shape[0]
    if len(shape) == 3 and kind in ("GptOssExperts", "Llama4TextExperts"):
        return shape[0] * shape[2]
    if len(shape) == 3 and "Expert" in kind:
        return shape[0] * shape[1]
    if kind == "DbrxExpertGLU":
        return module.moe_num_experts * shape[1] if leaf == "w2" else shape[0]
    return None


# --- the prover itself ------------------------------------------------------------------------------------------------


def _wrong(
    monkeypatch: pytest.MonkeyPatch, cls: str, leaf: str, parts: Callable[[Context], tuple[int, list[Part]]]
) -> None:
    """Put a wrong row on top of the table."""
    module = sys.modules["optimizer.partition.discover"]  # the package has a function of the same name

    def make(place: Context, why: str) -> Anatomy:
        repeat, made = parts(place)
        return place.anatomy(made, why, repeat=repeat)

    row = Family(classes=(cls,), why="a wrong row", params={leaf: make})
    monkeypatch.setattr(module, "FAMILIES", (row, *module.FAMILIES))


def _thirds(*roles: Role) -> Callable[[Context], tuple[int, list[Part]]]:
    return lambda place: (1, [Part(role, place.outputs // 3, 6) for role in roles])


Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
WRONG = {
    "half heads": ("llama", "LlamaAttention", "q_proj", lambda p: (1, [Part(Q, p.outputs, 3)])),
    "double heads": ("llama grouped", "LlamaAttention", "q_proj", lambda p: (1, [Part(Q, p.outputs, 12)])),
    "keys per query head": ("llama grouped", "LlamaAttention", "k_proj", lambda p: (1, [Part(K, p.outputs, 3)])),
    "shifted heads": (
        "llama",
        "LlamaAttention",
        "q_proj",
        lambda p: (1, [Part(Q, 3, 3), Part(Q, p.outputs - 6, 6), Part(Q, 3, 3)]),
    ),
    "a value taken for a key": ("llama", "LlamaAttention", "v_proj", lambda p: (1, [Part(K, p.outputs, 6)])),
    "a key taken for a value": ("llama", "LlamaAttention", "k_proj", lambda p: (1, [Part(V, p.outputs, 6)])),
    "a query taken for a dense layer": (
        "llama",
        "LlamaAttention",
        "q_proj",
        lambda p: (1, [Part(Role.MLP_IN, p.outputs)]),
    ),
    "[K|Q|V] for [Q|K|V]": ("gpt2", "GPT2Attention", "c_attn", _thirds(K, Q, V)),
    "[Q|V|K] for [Q|K|V]": ("gpt2", "GPT2Attention", "c_attn", _thirds(Q, V, K)),
    "[Q|K|V] for (head, 3, head_dim)": ("bloom", "BloomAttention", "query_key_value", _thirds(Q, K, V)),
    "(head, 3, head_dim) for [Q|K|V]": (
        "mpt",
        "MptAttention",
        "Wqkv",
        lambda p: (5, [Part(Q, 6, 6), Part(K, 6, 6), Part(V, 6, 6)]),
    ),
    "CodeGen as [Q|K|V]": (
        "codegen",
        "CodeGenAttention",
        "qkv_proj",
        lambda p: (1, [Part(r, p.outputs // 3, 8) for r in (Q, K, V)]),
    ),
    "a gate taken for a query": ("qwen3_next", "Qwen3NextAttention", "q_proj", lambda p: (1, [Part(Q, p.outputs, 8)])),
    "[k|v] of a latent as [K|V]": (
        "deepseek_v3",
        "DeepseekV3Attention",
        "kv_b_proj",
        lambda p: (1, [Part(K, 18, 6), Part(V, 30, 10)]),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_row_is_contradicted(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cls, leaf, parts = WRONG[mistake]
    model = ALL[name]()
    _wrong(monkeypatch, cls, leaf, parts)
    found = verify(model).contradicted
    assert found and all(leaf in finding.name for finding in found), mistake


@pytest.mark.parametrize(
    ("make", "proven"),
    [
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(30, 5, 20, batch_first=True), 2), 2),
        (lambda: nn.TransformerDecoderLayer(30, 3, 20), 2),
        (lambda: nn.Transformer(30, 3, 1, 1, 20), 3),
        (lambda: nn.MultiheadAttention(30, 5, kdim=14, vdim=22), 3),
        (lambda: nn.MultiheadAttention(30, 5, add_bias_kv=True, add_zero_attn=True), 1),
    ],
)
def test_torch_attention(make: Callable[[], nn.Module], proven: int) -> None:
    torch.manual_seed(0)
    report = verify(make())
    assert len(report.of(Verdict.PROVEN)) == proven == len(report.findings), str(report)


def test_torch_attention_in_another_order_is_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    _wrong(monkeypatch, "MultiheadAttention", "in_proj_weight", _thirds(K, V, Q))
    torch.manual_seed(0)
    assert verify(nn.MultiheadAttention(30, 5)).contradicted


class Unheard(nn.Module):
    """An attention of names nobody has declared."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_everything = nn.Linear(12, 36)
        self.back = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.mix_everything(x).chunk(3, -1))
        return self.back(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UnheardAttention(Unheard):
    """The same, calling itself attention."""


def test_an_attention_nobody_has_declared() -> None:
    """Loud in the partition where its name gives it away; contradicted by gradients whatever it is called."""
    assert not discover(UnheardAttention())["mix_everything.weight"].recognised
    for model in (UnheardAttention(), Unheard(), nn.Sequential(nn.Linear(12, 12), Unheard())):
        report = verify(model)
        assert [f.name.split(".")[-2] for f in report.contradicted] == ["mix_everything"], str(report)


def test_inputs_and_what_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match="nothing to verify"):
        verify(nn.Sequential(nn.Linear(3, 3)))
    model = ALL["llama"]()
    with pytest.raises(RuntimeError, match="inputs 0 fails"):
        verify(model, {"input_ids": "no tensor"})
    assert not verify(model, {"input_ids": torch.tensor([[3, 4, 5]])}).contradicted
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        verify(nn.MultiheadAttention(4, 2))

    class SecretiveAttention(UnheardAttention):
        def forward(self, x: torch.Tensor, *, password: str) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    with pytest.raises(ValueError, match=r"--inputs module:function"):
        verify(SecretiveAttention())


def test_verifying_leaves_the_model_alone() -> None:
    model = ALL["gpt2"]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    verify(model)
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_contradiction_with_the_configuration_names_both_numbers() -> None:
    model = ALL["llama"]()
    model.model.layers[0].self_attn.head_dim = 7
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*head_dim=7.*30 rows"):
        discover(model)


def test_the_committed_sweep_has_nothing_wrong_in_it() -> None:
    """docs/coverage.md says of every class what the partition and its gradients said."""
    text = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    found = re.search(r"(\d+) classes, (\d+) build; (\d+) of those .*; (\d+) contradicted by gradients", text)
    assert found is not None
    classes, build, clean, contradicted = (int(n) for n in found.groups())
    assert contradicted == 0 and clean >= 0.95 * build and build >= 0.9 * classes
    assert len(re.findall(r"^\| \w+For\w+ \|", text, re.MULTILINE)) == classes
