"""Every weight of every library's model that a workload trains is recognised, or named here with the reason.

``PYTHONPATH=. .venv/workloads/bin/python -m tests.workloads.check_recognition`` prints how each is recognised: by a
family (its module is in the table), by its layer or its name, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from experiments.configs import of_workloads
from experiments.models import build as build_language_model
from experiments.workloads import graphs, vision
from experiments.workloads.libraries import library
from optimizer import explain
from optimizer.partition import discover

UNKNOWN: dict[str, dict[str, str]] = {}
"""Model -> weight -> why it has the default unit. None has."""


def timm(name: str) -> nn.Module:
    return library("timm", "a check").create_model(name)


def unet(**more: Any) -> nn.Module:
    return library("diffusers", "a check").UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **more,
    )


def dit() -> nn.Module:
    return library("diffusers", "a check").DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )


def smollm2(head: str) -> nn.Module:
    """SmolLM2-135M's sizes, with two of its layers."""
    transformers = library("transformers", "a check")
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return getattr(transformers, f"LlamaFor{head}")(transformers.LlamaConfig(**sizes, **heads))


def graph(name: str) -> nn.Module:
    return graphs.build(of_workloads()[name].model, 40, 0)


def language(name: str) -> nn.Module:
    return build_language_model(of_workloads()[name].model, 0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm's resnet18": lambda: timm("resnet18"),
    "timm's ViT": lambda: timm("vit_tiny_patch16_224"),
    "timm's Swin": lambda: timm("swin_tiny_patch4_window7_224"),
    "resnet": lambda: vision.build(of_workloads()["resnet"].model, 0),
    "resnet_batchnorm": lambda: vision.build(of_workloads()["resnet_batchnorm"].model, 0),
    "vit": lambda: vision.build(of_workloads()["vit"].model, 0),
    "diffusers' UNet": unet,
    "diffusers' UNet, with classes": lambda: unet(num_class_embeds=10),
    "diffusers' DiT": dit,
    "gcn": lambda: graph("gcn"),
    "gcn-ogbn-arxiv": lambda: graph("gcn-ogbn-arxiv"),
    "gat": lambda: graph("gat"),
    "gat-ogbn-arxiv": lambda: graph("gat-ogbn-arxiv"),
    "gpt2": lambda: language("gpt2"),
    "llama": lambda: language("llama"),
    "SmolLM2": lambda: smollm2("CausalLM"),
    "SmolLM2, one score per text": lambda: smollm2("SequenceClassification"),
}


def recognition(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return name -> (``family``, ``layer or name`` or ``default``; the reason) of every parameter."""
    how = {}
    for name, anatomy in discover(model).items():
        found = "default" if not anatomy.recognised else "family" if anatomy.declared else "layer or name"
        how[name] = (found, anatomy.reason)
    return how


@pytest.mark.parametrize("name", MODELS)
def check_every_weight_is_recognised_or_named(name: str) -> None:
    model, known = MODELS[name](), UNKNOWN.get(name, {})
    shapes = {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}
    how = recognition(model)
    unknown = {weight for weight, (found, _) in how.items() if found == "default" and len(shapes[weight]) >= 2}
    assert unknown == set(known), f"{name}: {explain(model)}"
    assert len(how) == len(shapes) and ("! " in explain(model)) == bool(known)


def check_a_weight_that_nothing_knows_is_found() -> None:
    model = unet()
    model.mid_block.register_parameter("mystery", nn.Parameter(torch.zeros(4, 4)))
    assert recognition(model)["mid_block.mystery"][0] == "default" and "! mid_block.mystery" in explain(model)


def main() -> None:
    """Print how the parameters of every model are recognised."""
    for name, make in MODELS.items():
        how = recognition(make())
        counts = Counter(how.values())
        print(f"{name}: {len(how)} parameters")  # noqa: T201
        for (found, why), count in sorted(counts.items()):
            print(f"    {count:4} {found:13}  {why}")  # noqa: T201


if __name__ == "__main__":
    main()
