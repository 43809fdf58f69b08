"""Products of single vectors by a gradient graph that is kept: the same numbers, and when it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessian.kept_graph
from experiments.models import lm_loss
from hessian import GGNOperator, HessianOperator, eigenpairs
from hessian.kept_graph import KeptGraph
from tests.hessian.subjects import batches_for, gpt, llama, mlp
from tests.hessian.test_gauss_newton import cross_entropy, logits


@pytest.mark.parametrize("make", [gpt, llama, mlp])
def test_products_are_the_same(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    batches = batches_for(model, (5,))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    monkeypatch.setattr(hessian.kept_graph, "KEEP_AFTER", 10**9)
    wanted = HessianOperator(model, lm_loss, None, batches) @ v
    monkeypatch.setattr(hessian.kept_graph, "KEEP_AFTER", 0)
    operator = HessianOperator(model, lm_loss, None, batches)
    for _ in range(3):
        torch.testing.assert_close(operator @ v, wanted, rtol=0, atol=1e-12)
    assert operator._singles.graph is not None
    with torch.inference_mode():
        torch.testing.assert_close(operator @ v, wanted, rtol=0, atol=1e-12)


def test_several_batches_and_the_gauss_newton_matrix_keep_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.kept_graph, "KEEP_AFTER", 0)
    model = llama()
    several = HessianOperator(model, lm_loss, None, batches_for(model))
    newton = GGNOperator(model, logits, cross_entropy, None, batches_for(model, (5,)))
    v = torch.ones(several.shape[0], dtype=torch.float64)
    for operator in (several, newton):
        once = operator @ v
        assert torch.equal(operator @ v, once) and operator._singles.graph is None


def test_parameters_without_curvature_have_zeros() -> None:
    theta = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    kept = KeptGraph(lambda t, _: t["a"].pow(3).sum() + t["b"].sum(), theta, None)
    product = kept({"a": torch.tensor([1.0, 2.0]).double(), "b": torch.ones(3).double()})
    assert product["a"].tolist() == [6.0, 12.0] and not product["b"].any()
    linear = KeptGraph(lambda t, _: t["a"].sum() + t["b"].sum(), theta, None)
    assert not any(x.any() for x in linear({"a": theta["a"], "b": theta["b"]}).values())


def test_a_graph_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.kept_graph, "KEEP_AFTER", 0)
    call = KeptGraph.__call__
    monkeypatch.setattr(KeptGraph, "__call__", lambda *given: {n: 1.001 * x for n, x in call(*given).items()})
    operator = HessianOperator(mlp(), lm_loss, None, batches_for(mlp(), (5,)))
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    assert torch.equal(operator @ v, operator @ v) and operator._singles.graph is None


def test_eigenpairs_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    call = KeptGraph.__call__
    monkeypatch.setattr(KeptGraph, "__call__", lambda self, tangent: asked.append(1) or call(self, tangent))
    model = mlp()
    operator = HessianOperator(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), None, batches_for(model, (5,)))
    found = eigenpairs(operator, k=1)
    assert len(asked) > found.products / 2 and found.residuals.max() < 1e-8
