"""Products by graphs of the gradient: the same numbers, when they are used, and what they keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessian.operators
from experiments.models import lm_loss
from hessian import GGNOperator, HessianOperator, eigenpairs
from hessian.double_backward import BY_HAND, ByHand
from hessian.kept_graph import GraphProducts, KeptGraph
from tests.hessian.subjects import batches_for, gpt, llama, mlp
from tests.hessian.test_gauss_newton import cross_entropy, logits


@pytest.mark.parametrize("sizes", [(5,), (7, 3)], ids=["one batch", "two batches"])
@pytest.mark.parametrize("make", [gpt, llama, mlp])
def test_products_are_the_same(
    make: Callable[[], nn.Module], sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    operator = HessianOperator(model, lm_loss, None, batches_for(model, sizes))
    V = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made: list[int] = []
    graph = GraphProducts.graph
    monkeypatch.setattr(GraphProducts, "graph", lambda self, i: made.append(i) or graph(self, i))
    wanted = operator.matmat(V)
    assert not made and operator.work.per_operation < hessian.operators.LARGE
    torch.testing.assert_close(operator @ V[:, 0], wanted[:, 0], rtol=0, atol=1e-12)
    assert made == list(range(len(sizes)))
    monkeypatch.setattr(hessian.operators, "LARGE", 0)
    torch.testing.assert_close(operator.matmat(V), wanted, rtol=0, atol=1e-12)
    assert made == 2 * list(range(len(sizes)))
    with torch.inference_mode():
        torch.testing.assert_close(operator @ V, wanted, rtol=0, atol=1e-12)


def test_products_have_the_same_bits_every_time() -> None:
    model = llama()
    first, again = (HessianOperator(model, lm_loss, None, batches_for(model, (5,))) for _ in range(2))
    v = torch.ones(first.shape[0], dtype=torch.float64)
    once = first @ v
    assert torch.equal(once, first @ v) and torch.equal(once, again @ v) and first.work == again.work


def test_a_graph_is_kept_for_one_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[KeptGraph]] = []
    init = KeptGraph.__init__

    def remembered(self: KeptGraph, *given: object) -> None:
        alive.append(weakref.ref(self))
        init(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(KeptGraph, "__init__", remembered)
    model = mlp()
    one = HessianOperator(model, lm_loss, None, batches_for(model, (5,)))
    v = torch.ones(one.shape[0], dtype=torch.float64)
    one @ v
    assert len(alive) == 1 and alive[0]() is not None
    several = HessianOperator(model, lm_loss, None, batches_for(model))
    several @ v
    assert len(alive) > 3 and not any(reference() for reference in alive[1:])


def test_the_gauss_newton_matrix_keeps_no_graph() -> None:
    newton = GGNOperator(llama(), logits, cross_entropy, None, batches_for(llama(), (5,)))
    v = torch.ones(newton.shape[0], dtype=torch.float64)
    assert newton.work is None and torch.equal(newton @ v, newton @ v)


def test_parameters_without_curvature_have_zeros() -> None:
    theta = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    kept = KeptGraph(lambda t, _: t["a"].pow(3).sum() + t["b"].sum(), theta, None)
    product = kept(torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).double())
    assert product[0].tolist() == [6.0, 12.0] and not product[1].any()
    linear = KeptGraph(lambda t, _: t["a"].sum() + t["b"].sum(), theta, None)
    assert not any(x.any() for x in linear(torch.ones(5).double()))


def test_a_graph_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    call = KeptGraph.__call__
    monkeypatch.setattr(KeptGraph, "__call__", lambda *given: [1.001 * x for x in call(*given)])
    operator = HessianOperator(mlp(), lm_loss, None, batches_for(mlp(), (5,)))
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    assert operator.work is None
    monkeypatch.undo()
    torch.testing.assert_close(
        operator @ v, HessianOperator(mlp(), lm_loss, None, batches_for(mlp(), (5,))) @ v, rtol=0, atol=1e-12
    )


def test_eigenpairs_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    call = KeptGraph.__call__
    monkeypatch.setattr(KeptGraph, "__call__", lambda self, vector: asked.append(1) or call(self, vector))
    model = mlp()
    operator = HessianOperator(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), None, batches_for(model, (5,)))
    found = eigenpairs(operator, k=1)
    assert len(asked) > found.products / 2 and found.residuals.max() < 1e-8


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gelu": lambda x, w, b: F.gelu(x * w + b),
    "tanh gelu": lambda x, w, b: F.gelu(x * w + b, approximate="tanh"),
    "silu": lambda x, w, b: F.silu(x * w + b),
    "layer norm": lambda x, w, b: F.layer_norm(x.sin(), [5], w, b),
    "layer norm without bias": lambda x, w, b: F.layer_norm(x.sin(), (5,), weight=w, eps=1e-3),
    "layer norm without weight": lambda x, w, b: F.layer_norm(x * w + b.square(), [5]),
    "layer norm over two axes": lambda x, w, b: F.layer_norm(x * w + b.square(), [3, 5]),
}


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_by_hand_are_those_of_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator).double() for shape in ((4, 3, 5), (5,), (5,)))
    answers = []
    for by_hand in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        if by_hand:
            with ByHand():
                value = CALLS[name](*leaves)
        else:
            value = CALLS[name](*leaves)
        first = torch.autograd.grad(value.pow(3).sum(), leaves, create_graph=True, materialize_grads=True)
        weighed = sum((g * (i + 1) * g.detach().cos()).sum() for i, g in enumerate(first))
        answers.append([value, *first, *torch.autograd.grad(weighed, leaves, materialize_grads=True)])
    for found, wanted in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_derivatives_by_hand_are_used() -> None:
    assert set(BY_HAND) == {F.gelu, F.silu, F.layer_norm}
    x = torch.ones(3, requires_grad=True)
    with ByHand():
        assert "_Activation" in F.silu(x).grad_fn.name()
    assert "_Activation" not in F.silu(x).grad_fn.name()
