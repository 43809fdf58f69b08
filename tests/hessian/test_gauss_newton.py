"""The Gauss-Newton matrix against the one assembled from the network's Jacobian and the softmax's known curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessian.operators
from experiments.models import lm_loss
from hessian import GGNOperator, HessianOperator, dense
from tests.hessian.subjects import batches_for, gpt, joined, llama, mlp


def logits(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def cross_entropy(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), batch[1].flatten())


def assembled(model: nn.Module, batch: Any) -> Tensor:
    """Sum over tokens of J^T (diag(p) - p p^T) J, divided by their number."""
    with sdpa_kernel(SDPBackend.MATH):
        out = model(batch[0]).flatten(0, -2)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(
                entry, list(model.parameters()), retain_graph=True, materialize_grads=True
            )]) for entry in out.flatten()
        ]  # fmt: skip
    p = out.detach().softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    J = torch.stack(rows).reshape(*p.shape, -1)
    return torch.einsum("nci,ncd,ndj->ij", J, curvature, J) / len(p)


@pytest.mark.parametrize(("make", "traced"), [(gpt, False), (llama, False), (mlp, False), (llama, True)])
def test_it_is_the_gauss_newton_matrix(make: Any, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.operators, "LINEARISE_AFTER", 0 if traced else 10**9)
    model = make()
    batches = batches_for(model)
    operator = GGNOperator(model, logits, cross_entropy, None, batches)
    found = dense(operator, chunk=50)
    assert bool(operator._programs) == traced
    torch.testing.assert_close(found, assembled(model, joined(batches)), rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > -1e-12
    whole = dense(HessianOperator(model, lm_loss, None, batches))
    assert (whole - found).abs().max() > 1e-2  # the rest of the Hessian is not small


def test_it_is_the_hessian_of_a_linear_model() -> None:
    model = nn.Linear(3, 4).double()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 3, generator=generator).double(), torch.arange(n) % 4) for n in (5, 2)]
    G = GGNOperator(model, logits, cross_entropy, None, batches)
    H = HessianOperator(model, lambda m, b: cross_entropy(m(b[0]), b), None, batches)
    torch.testing.assert_close(dense(G), dense(H), rtol=0, atol=1e-14)


def test_a_criterion_of_several_outputs_that_is_no_mean_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="mean"):
        GGNOperator(model, logits, lambda out, b: cross_entropy(out, b) * len(out), None, batches_for(model))
