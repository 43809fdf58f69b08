"""A parametrized weight is what the module says that it computes; and projections in a list are their attention's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from optimizer import AdamMini, Role, partition
from optimizer.partition import discover
from tests.optimizer.models import wrap_compiled


class Attention(nn.Module):
    """Separate projections, two heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.v_proj(x)) + self.q_proj(x) + self.k_proj(x)


def old(function: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def quiet(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return function(module)

    return quiet


WAYS = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (old(weight_norm), "weight_v"),
    "old spectral_norm": (old(spectral_norm), "weight_orig"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_parametrized_projection_keeps_its_role_and_heads(way: str) -> None:
    wrap, leaf = WAYS[way]
    model = Attention()
    plain = partition(model)
    for name in ("q_proj", "v_proj", "o_proj"):
        wrap(getattr(model, name))
    found = partition(model)
    for name in ("q_proj", "v_proj", "o_proj"):
        assert found[f"{name}.{leaf}"] == plain[f"{name}.weight"]
    assert discover(model)[f"q_proj.{leaf}"].role is Role.QUERY
    model(torch.randn(3, 8)).square().sum().backward()
    AdamMini(model, strict=True).step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("layer", "role"),
    [(nn.Linear(6, 5), Role.MLP_IN), (nn.Conv2d(3, 5, 3), Role.CONV), (nn.Embedding(7, 4), Role.TOKEN_EMBEDDING)],
)
def test_a_parametrized_layer_is_the_layer(way: str, layer: nn.Module, role: Role) -> None:
    wrap, leaf = WAYS[way]
    plain = partition(nn.Sequential(copy.deepcopy(layer), nn.Linear(2, 2)))["0.weight"]
    model = nn.Sequential(wrap(copy.deepcopy(layer)), nn.Linear(2, 2))
    assert discover(model)[f"0.{leaf}"].role is role
    assert partition(model)[f"0.{leaf}"] == plain


class MultiHeadedAttention(nn.Module):
    """Four projections in a list, as in a well-known tutorial."""

    def __init__(self, kind: type = nn.ModuleList) -> None:
        super().__init__()
        self.h, self.d_k = 2, 4
        projections = [nn.Linear(8, 8) for _ in range(4)]
        self.linears = nn.Sequential(*projections) if kind is nn.Sequential else nn.ModuleList(projections)


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_projections_in_a_container_are_their_attentions(kind: type) -> None:
    model = nn.ModuleDict({"layer": MultiHeadedAttention(kind)})
    assert all(discover(model)[f"layer.linears.{i}.weight"].role is Role.OTHER for i in range(4))
    with pytest.raises(ValueError, match="MultiHeadedAttention"):
        AdamMini(model, strict=True)


class Linears(nn.Module):
    """A projection of its own class: a layer, and a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)


class CrossAttn(nn.Module):
    """Two projections that any module may hold, in whatever wraps them."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = wrap(nn.Linear(8, 8)), wrap(nn.Linear(8, 8))


WRAPS = {
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "sequential": lambda layer: nn.Sequential(layer, nn.Dropout(0.1)),
    "nested": lambda layer: nn.Sequential(nn.ModuleDict({"proj": nn.ModuleList([layer])})),
    "own class": lambda layer: Linears(),
    "compiled": wrap_compiled,
    "in a sequential, compiled": lambda layer: nn.Sequential(wrap_compiled(layer)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_projections_in_any_wrapper_are_their_attentions(wrap: str) -> None:
    model = nn.ModuleDict({"layer": CrossAttn(WRAPS[wrap])})
    found = {name: anatomy.role for name, anatomy in discover(model).items() if len(anatomy.shape) == 2}
    assert set(found.values()) == {Role.OTHER}, found
    with pytest.raises(ValueError, match="inside CrossAttn"):
        AdamMini(model, strict=True)


class AttentionBlock(nn.Module):
    """An attention that is known, and a feed-forward block in a container beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_a_feed_forward_block_beside_a_known_attention_is_one() -> None:
    model = nn.Sequential(AttentionBlock())
    assert discover(model)["0.mlp.0.weight"].role is discover(model)["0.mlp.2.weight"].role is Role.MLP_IN
    AdamMini(model, strict=True)


class LowRank(nn.Module):
    """A parametrization by two factors."""

    def forward(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return u @ v

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight[:, :2].clone(), weight[:2].clone()


def test_factors_of_a_weight_are_no_length() -> None:
    model = Attention()
    nn.utils.parametrize.register_parametrization(model.q_proj, "weight", LowRank())
    found = discover(model)
    assert {found[f"q_proj.parametrizations.weight.original{i}"].role for i in range(2)} == {Role.OTHER}


@pytest.mark.parametrize("leaf", ["orig", "v"])
def test_other_weights_than_weight(leaf: str) -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    plain = partition(model)["0.in_proj_weight"]
    if leaf == "orig":
        prune.identity(model[0], "in_proj_weight")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            weight_norm(model[0], "in_proj_weight")
    assert partition(model)[f"0.in_proj_weight_{leaf}"] == plain
    AdamMini(model, strict=True)
