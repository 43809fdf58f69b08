"""A name makes a vector a scale or a bias, never a matrix: a guess that ``strict=True`` would let pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Role
from optimizer.partition import discover

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
