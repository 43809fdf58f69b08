"""LoRA by PEFT: factors by their policy, base layers as they are without it, quantised ones packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Role, partition
from optimizer.partition import discover
from tests.optimizer.zoo import TEXT

# PEFT takes seconds to import: in the tests, and in one worker.
pytestmark = pytest.mark.xdist_group("peft")


def adapted(model: nn.Module, *targets: str, **options: Any) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=list(targets), **options))


@pytest.mark.parametrize("name", ["llama grouped", "gpt2", "gpt_neox", "deepseek_v3", "t5"])
def test_base_layers_keep_their_layouts(name: str) -> None:
    targets = {
        "llama grouped": ("q_proj", "v_proj", "down_proj"),
        "gpt2": ("c_attn", "c_fc"),
        "gpt_neox": ("query_key_value",),
        "deepseek_v3": ("kv_b_proj", "q_b_proj"),
        "t5": ("q", "wo"),
    }
    expected = partition(TEXT[name]())
    model = adapted(TEXT[name](), *targets[name])
    found = {n.removeprefix("base_model.model.").replace(".base_layer", ""): x for n, x in partition(model).items()}
    assert {n: found[n] for n in expected} == expected


def test_factors_have_a_scalar_per_output_unit() -> None:
    model = adapted(TEXT["llama grouped"](), "q_proj", "embed_tokens", use_dora=False, modules_to_save=["lm_head"])
    anatomies, layouts = discover(model), partition(model)
    assert all(a.recognised for a in anatomies.values())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, anatomy in anatomies.items():
        if "lora_embedding_A" in name:  # (rank, vocabulary): looked up by column
            assert layouts[name].n_blocks == shapes[name][1] and anatomy.role is Role.LORA_A
        elif "lora_" in name:
            assert layouts[name].n_blocks == shapes[name][0]
            assert anatomy.role is (Role.LORA_B if "_B" in name else Role.LORA_A)
    assert anatomies["base_model.model.lm_head.modules_to_save.default.weight"].role is Role.HEAD


def test_several_adapters_and_dora() -> None:
    import peft

    model = adapted(TEXT["llama"](), "k_proj", use_dora=True)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    anatomies = discover(model)
    assert all(a.recognised for a in anatomies.values())
    assert {a.role for n, a in anatomies.items() if "second" in n} == {Role.LORA_A, Role.LORA_B}
    assert {a.role for n, a in anatomies.items() if "magnitude" in n} == {Role.NORM}


class Packed(nn.Linear):
    """A quantiser's layer as bitsandbytes keeps it: half a byte per weight, integers of another shape."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out, bias=False)
        packed = torch.zeros(size * out // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def _packed(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(48, 36)


def test_over_quantised_base_weights() -> None:
    model = TEXT["llama grouped"]()
    _packed(model)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = _with_factors(layer.self_attn.q_proj)
    assert all(a.recognised for a in discover(model).values())
    optimizer = AdamMini(model, strict=True)
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert len(names) == 4 and all("lora_" in name for name in names)


def _with_factors(base: nn.Module) -> nn.Module:
    """PEFT's layer around a base layer it need not know how to multiply with."""
    import peft

    layer = peft.tuners.lora.Linear(nn.Linear(48, 36, bias=False), "default", config=peft.LoraConfig(r=3), r=3)
    layer.base_layer = base
    return layer
