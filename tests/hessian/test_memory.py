"""How many vectors of memory an operator takes at its peak, and that freed memory goes back to the system."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import allocations
from hessian import HessianOperator, heap, symmetry
from tests.hessian.subjects import batches_for, mlp

WIDTH, DEPTH = 512, 4


def wide() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model of one million parameters and a batch so small that activations do not count."""
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*layers), [(torch.randn(2, WIDTH), torch.randn(2, WIDTH))]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].softmax(-1))


def test_construction_and_products_take_few_vectors_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetry, "SLICE", 2**14)  # Of a model this small, slices would be the whole.
    model, batches = wide()
    made: list[HessianOperator] = []
    vector = 4 * DEPTH * WIDTH * WIDTH
    peak = allocations(lambda: made.append(HessianOperator(model, loss, None, batches, mean_check=False))).peak
    assert peak / vector < 5.2, "4.8 were measured: the weights' copy, signs, a vector, and products being compared"
    v = torch.ones(made[0].shape[0])
    assert allocations(lambda: made[0] @ v).peak / vector < 2.5, "of the product and its parts"


def test_the_weights_are_those_at_construction() -> None:
    model = mlp()
    operator = HessianOperator(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), None, batches_for(model, (5,)))
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    before = operator @ v
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(operator @ v, before)


def test_construction_leaves_the_model_s_weights_as_they_are() -> None:
    """A loss may write to weights: an embedding with a limit of its norm scales the rows that it looks up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Linear(4, 6)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = torch.randint(6, (8,)), torch.randint(6, (8,))
    operator = HessianOperator(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), None, [batch])
    assert torch.isfinite(operator @ torch.ones(operator.shape[0], dtype=torch.float64)).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_freed_memory_is_given_back_only_for_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        malloc_trim = staticmethod(asked.append)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    heap.trim(heap.FROM - 1)
    assert not asked
    heap.trim(heap.FROM)
    assert asked == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.trim(heap.FROM)  # A library without the function: nothing happens.
    assert asked == [0]


def test_signs_that_wait_are_small() -> None:
    theta = {"a": torch.ones(3, 2), "b": torch.ones(4)}
    signs = symmetry.direction(theta, 0)
    assert signs.dtype is torch.int8 and signs.abs().tolist() == [1] * 10


def test_signs_are_multiplied_as_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode copies a tangent that is a part of a larger tensor: a vector more, for nothing."""
    sizes: list[bool] = []
    product = HessianOperator._product

    def watched(self: HessianOperator, tangent: dict[str, Tensor], batch: object) -> dict[str, Tensor]:
        sizes.extend(t.untyped_storage().nbytes() == t.nbytes for t in tangent.values())
        return product(self, tangent, batch)

    monkeypatch.setattr(HessianOperator, "_product", watched)
    HessianOperator(mlp(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), None, batches_for(mlp(), (5,)))
    assert sizes and all(sizes)
