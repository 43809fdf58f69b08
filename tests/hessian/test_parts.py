"""Weight matrices and parts of fused ones: which elements of a parameter they are, and what may share in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from experiments.models import GPTConfig, LlamaConfig, build
from hessian.parts import weight_parts
from tests.sharding.models import MODELS

LLAMA = LlamaConfig(vocab=8, dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden=8)
GPT = GPTConfig(vocab=8, block_size=8, n_embd=16, n_layer=1, n_head=4)


@pytest.mark.parametrize(
    "make", [lambda: build(GPT, 0), lambda: build(LLAMA, 0), MODELS["gpt2"], MODELS["mixtral"], MODELS["llama"]]
)
def test_parts_are_every_element_of_every_matrix_once(make: Callable[[], nn.Module]) -> None:
    model = make()
    found: dict[str, list[torch.Tensor]] = {}
    for part in weight_parts(model):
        assert part.index.shape == part.shape
        found.setdefault(part.parameter, []).append(part.index.flatten())
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2}
    assert {name: sorted(torch.cat(cut).tolist()) for name, cut in found.items()} == {
        name: list(range(numel)) for name, numel in matrices.items()
    }


def test_fused_matrix_falls_into_its_three_roles() -> None:
    model = build(GPT, 0)
    roles = {part.role.value: part for part in weight_parts(model)}
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight")
    for i, role in enumerate(("QUERY", "KEY", "VALUE")):
        assert torch.equal(roles[role].of(weight), weight[16 * i : 16 * (i + 1)])
    head = roles["KEY"].candidates()["ATTENTION_HEAD"].reshape(16, 16)
    assert head[:, 0].tolist() == [i // 4 for i in range(16)]
    column = roles["KEY"].candidates()["IN_NEURON"].reshape(16, 16)
    assert torch.equal(column, torch.arange(16).expand(16, 16))


def test_transposed_matrices_have_their_output_units_first() -> None:
    """GPT-2 stores [inputs, outputs]."""
    model = MODELS["gpt2"]()
    (part,) = [p for p in weight_parts(model) if p.name == "transformer.h.0.attn.c_attn.weight[KEY]"]
    weight = model.get_parameter(part.parameter)
    width = weight.shape[1] // 3
    assert torch.equal(part.of(weight), weight[:, width : 2 * width].T)


def test_grouped_keys_have_fewer_heads() -> None:
    roles = {part.role.value: part for part in weight_parts(build(LLAMA, 0))}
    assert int(roles["QUERY"].candidates()["ATTENTION_HEAD"].max()) + 1 == 4
    assert int(roles["KEY"].candidates()["ATTENTION_HEAD"].max()) + 1 == 2
