"""A name makes a vector a scale or a bias, never a matrix: a guess that ``strict=True`` would let pass."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Role, partition
from optimizer.partition import discover
from optimizer.partition.names import by_name

SCALES = ("upscale", "alpha", "lambda_1", "gamma_2", "temperature", "layer_scale")
CONSTANTS = ("A", "D", "b1", "time_mix", "sinks")


def holder(name: str, shape: tuple[int, ...], kind: str = "Holder") -> nn.Module:
    module = type(kind, (nn.Module,), {})()
    module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


@pytest.mark.parametrize("name", SCALES + CONSTANTS)
def test_a_matrix_is_not_what_its_name_suggests(name: str) -> None:
    model = holder(name, (6, 4))
    assert discover(model)[name].role is Role.OTHER
    with pytest.raises(ValueError, match=f"{name}.*not recognised|not recognised.*{name}"):
        AdamMini(model, strict=True)


@pytest.mark.parametrize("shape", [(6,), (1, 6, 1), (1,)])
@pytest.mark.parametrize("name", SCALES + CONSTANTS)
def test_a_vector_is_what_its_name_says(name: str, shape: tuple[int, ...]) -> None:
    assert discover(holder(name, shape))[name].role is (Role.NORM if name in SCALES else Role.BIAS)


def test_a_class_says_it_for_a_matrix() -> None:
    assert discover(holder("A_log", (6, 4), "MambaMixer"))["A_log"].role is Role.BIAS
    assert discover(holder("gamma", (6, 4), "HeadNorm"))["gamma"].role is Role.NORM


@pytest.mark.parametrize("kind", ["NormFace", "NormedProjection", "Enormous", "GRNMixer"])
def test_a_class_whose_name_holds_the_word_is_no_normalisation(kind: str) -> None:
    for name in ("weight", "g", "alpha"):
        assert discover(holder(name, (6, 4), kind))[name].role is Role.OTHER


@pytest.mark.parametrize("name", ["weight_g", "proj_weight_g"])
def test_a_gate_is_no_length_of_weight_norm(name: str) -> None:
    assert discover(holder(name, (6, 4)))[name].role is Role.OTHER
    assert discover(holder(name, (6, 1)))[name].role is Role.NORM


@pytest.mark.parametrize(
    "name", ["norm_proj.weight", "prenorm.fn.net.0.weight", "ln_mix.weight", "norm.weight", "norm.net.scale"]
)
def test_a_name_alone_makes_no_matrix_a_norm(name: str) -> None:
    assert by_name(name, (6, 4)).role is Role.OTHER
    with pytest.raises(ValueError, match="not recognised"):
        AdamMini([(name, nn.Parameter(torch.zeros(6, 4)))], strict=True)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("norm.weight", Role.NORM), ("norm.scale", Role.NORM), ("layers.0.ln_1.weight", Role.NORM),
        ("bn1.weight", Role.NORM), ("layers.0.weight", Role.NORM), ("weight", Role.NORM), ("fc.bias", Role.BIAS),
        ("prenorm.fn.net.mixing", Role.BIAS), ("mixing", Role.BIAS), ("mixing_weight", Role.BIAS), ("", Role.BIAS),
        ("query", Role.BIAS),
    ],
)  # fmt: skip
def test_a_vector_is_a_norm_only_where_its_name_says_so(name: str, role: Role) -> None:
    assert by_name(name, (6,)).role is role


def test_vectors_that_nobody_names_share_nothing_and_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ParameterDict({"mixing": torch.ones(5), "temperature": torch.ones(5)})
    for params in (model, list(model.named_parameters()), list(model.parameters())):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            opt = AdamMini(params, strict=True)
        found = [layout.n_blocks for group in opt.layouts for layout in group]
        known = isinstance(params, nn.Module)
        assert found == [5, 1] if known else [5, 5]
        assert sum("may be biases or norms" in text for text in caplog.messages) == 1
        assert caplog.messages[-1].startswith("1 vector(s)" if known else "2 vector(s)")


@pytest.mark.parametrize("shape", [(12, 12), (3, 12, 4), (12, 3, 4), (3, 4, 12)])
@pytest.mark.parametrize(
    "names", [("wq", "wk", "wv", "wo"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("q", "k", "v", "o")]
)
def test_bare_projections_have_axes_that_nobody_knows(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """``x @ wq``, ``wq @ x`` and every einsum keep them differently."""
    model = nn.Module()
    model.n_heads = 3  # type: ignore[assignment]
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert {anatomy.role for anatomy in discover(model).values()} == {Role.OTHER}
    with pytest.raises(ValueError, match="4 weight"):
        AdamMini(model, strict=True)


@pytest.mark.parametrize("name", ["query_weight", "token_proj", "latent_kernel", "embed_matrix"])
def test_a_projection_of_tokens_is_no_table_of_them(name: str) -> None:
    assert discover(holder(name, (6, 4)))[name].role is Role.OTHER
    assert discover(holder("query_tokens", (6, 4)))["query_tokens"].role is Role.POSITION_EMBEDDING


@pytest.mark.parametrize(("kind", "name"), [("GATConv", "att_src"), ("GATConv", "attn_r"), ("GATv2Conv", "att")])
def test_attention_vectors_of_a_graph_have_a_unit_per_head(kind: str, name: str) -> None:
    """The layer's scores are ``(x * att).sum(-1)``: index h of axis 1 makes the score of head h alone."""
    model = holder(name, (1, 4, 16), kind)
    assert discover(model)[name].role is Role.MLP_IN
    assert partition(model)[name].n_blocks == 4
    assert partition(model, "elementwise")[name].n_blocks == 64
    AdamMini(model, strict=True)
