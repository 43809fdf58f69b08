"""Arguments and layers that torch's own optimizers take without a word: NumPy's numbers, bags of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optimizer import AdamMini, Role, partition
from optimizer.partition import discover


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(kind: type) -> None:
    optimizer = AdamMini(nn.Linear(2, 2), lr=kind(1), weight_decay=kind(0), betas=(kind(0), kind(0)))
    assert optimizer.param_groups[0]["lr"] == 1


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": False}, {"exp_avg_dtype": "int8"}])
@pytest.mark.parametrize("kind", [np.array, np.float32, np.float64, np.float16])
def test_numbers_of_numpy_take_the_steps_of_floats(kind: Any, options: dict[str, Any]) -> None:
    steps = []
    for number in (kind, lambda value: float(kind(value))):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        betas = (number(0.5), number(0.75))
        opt = AdamMini(model, number(0.125), betas, number(2**-20), number(0.5), **options)
        for _ in range(3):
            model(torch.ones(1, 3)).square().sum().backward()
            opt.step()
        steps.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*steps, strict=True))


def test_numbers_of_numpy_have_their_range() -> None:
    with pytest.raises(ValueError, match="lr"):
        AdamMini(nn.Linear(2, 2), lr=np.float32("nan"))
    with pytest.raises(ValueError, match="lr=array"):
        AdamMini(nn.Linear(2, 2), lr=np.array([0.1]))  # type: ignore[arg-type]


def test_a_bag_of_embeddings_has_one_block_per_row() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3))
    assert discover(model)["0.weight"].role is Role.TOKEN_EMBEDDING
    assert partition(model)["0.weight"].n_blocks == 7


class Odd(nn.Module):
    """A matrix that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = nn.Parameter(torch.zeros(3, 4))


def test_elementwise_has_to_know_nothing() -> None:
    assert AdamMini(Odd(), rules="elementwise", strict=True).state_bytes()["exp_avg_sq"] == 4 * 12
    with pytest.raises(ValueError, match="not recognised"):
        AdamMini(Odd(), strict=True)


@pytest.mark.parametrize("rules", [None, {}, 3, [], {"QUERY": "TENSOR"}, b"adam_mini"])
def test_what_is_no_rule_set_is_named(rules: Any) -> None:
    with pytest.raises(TypeError, match=r"rules=.*adam_mini.*Rules"):
        AdamMini(nn.Linear(2, 2), rules=rules)


def test_a_bag_of_embeddings_ties_the_output_layer() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 7))
    assert discover(model)["1.weight"].role is Role.HEAD
