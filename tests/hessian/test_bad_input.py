"""Input that would give wrong numbers is refused, and the message says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models import lm_loss
from hessian import HessianOperator, block_norms, diagonal, slq, trace
from hessian.probing import energy_inside
from tests.hessian.subjects import batches_for, llama


class NoisyGradient(torch.autograd.Function):
    """The identity, whose backward pass draws random numbers, as stochastic rounding does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-3 * torch.rand_like(grad))


def test_a_random_gradient_is_refused_although_the_loss_is_not_random() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return NoisyGradient.apply(model(batch)).square().mean()

    with pytest.raises(ValueError, match=r"gradient of batches\[0\] in 'weight' is not deterministic.*backward pass"):
        HessianOperator(model, loss, None, [x])


def labelled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def test_a_batch_without_labels_is_named() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    batches = [{"x": x, "labels": labels} for labels in (torch.tensor([0, 1, -100, 1]), torch.full((4,), -100))]
    HessianOperator(nn.Linear(3, 2).double(), labelled, None, batches[:1], count=lambda batch: 3)
    with pytest.raises(ValueError, match=r"batches\[1\]\) is nan; every label in batch\['labels'\] is -100.*leave it"):
        HessianOperator(nn.Linear(3, 2).double(), labelled, None, batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    for name in ("tok_embeddings.weight", "output.weight"):
        model = llama()
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value
        with pytest.raises(ValueError, match=rf"params\['{name}'\] has NaN or infinite.*find"):
            HessianOperator(model, lm_loss, None, batches_for(model))
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"the model's parameter '{name}', which is not in params, has NaN"):
        HessianOperator(model, lm_loss, None, batches_for(model))


class Lopsided:
    """An operator that is not symmetric."""

    shape, dtype, device = (6, 6), torch.float64, torch.device("cpu")

    def __init__(self, skew: float) -> None:
        self.matrix = torch.diag(torch.arange(1.0, 7)).double()
        self.matrix[0, 3] = skew

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


IDS = torch.tensor([0, 0, 0, 1, 1, 1])
ALGORITHMS: list[Callable[[Any], Any]] = [
    lambda A: slq(A, steps=3, probes=4),
    lambda A: trace(A, 4, "hutchinson"),
    lambda A: trace(A, 5, "xtrace"),
    lambda A: diagonal(A, 4, "hutchinson"),
    lambda A: diagonal(A, 5, "xdiag"),
    lambda A: block_norms(A, IDS, probes=4),
    lambda A: energy_inside(A, IDS, probes=6),
]


@pytest.mark.parametrize("run", ALGORITHMS)
def test_an_operator_that_is_not_symmetric_is_refused_by_every_algorithm(run: Callable[[Any], Any]) -> None:
    run(Lopsided(1e-9))  # rounding
    with pytest.raises(ValueError, match=r"the operator is not symmetric.*symmetric part"):
        run(Lopsided(3.0))
