"""Operators whose batches are on two gloo ranks, against one process with all batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.models import lm_loss
from hessian import GGNOperator, HessianOperator, RankOperator, slq
from tests.hessian.subjects import batches_for, llama
from tests.hessian.test_gauss_newton import cross_entropy, logits
from tests.sharding.workers import run

pytestmark = pytest.mark.xdist_group("hessian on two ranks")
HERE = "tests.hessian.test_distributed:"
SIZES = (7, 3, 2)
"""Rows of the batches; the first rank has the first, the second the others."""


def operators(batches: list[Any]) -> list[HessianOperator]:
    model = llama()
    return [HessianOperator(model, lm_loss, None, batches), GGNOperator(model, logits, cross_entropy, None, batches)]


def products_of_ranks() -> list[Any]:
    batches = batches_for(llama(), SIZES)
    own = batches[:1] if dist.get_rank() == 0 else batches[1:]
    found: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operator in operators(own):
            shared = RankOperator(operator, count=sum(y.numel() for _, y in own))
            v = torch.linspace(-1, 1, shared.shape[0], dtype=shared.dtype)
            found += [shared @ v, slq(shared, steps=5, probes=2).nodes]
    return [*found, " ".join(str(w.message) for w in caught if "batches that another rank" in str(w.message))]


def refusals() -> list[str]:
    said = []
    for count, change in ((0, 0.0), (1, 1e-3)):
        model = llama()
        with torch.no_grad():
            next(model.parameters()).add_(change * dist.get_rank())
        try:
            RankOperator(HessianOperator(model, lm_loss, None, batches_for(model)), count or 1 - dist.get_rank())
        except ValueError as error:
            said.append(str(error))
    return said


def other_refusals() -> list[str]:
    """What is said where ranks have other kinds of operators, other vectors, and the same batches."""
    model, said = llama(), []
    kinds = operators(batches_for(model))
    try:
        RankOperator(kinds[dist.get_rank()], count=1)
    except ValueError as error:
        said.append(str(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shared = RankOperator(kinds[0], count=1)
    said.append(" ".join(str(w.message) for w in caught))
    v = torch.ones(shared.shape[0], 2, dtype=shared.dtype)
    v[3, 1] += dist.get_rank() * 1e-3
    try:
        shared @ v
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    cases = {"products": "products_of_ranks", "refusals": "refusals", "others": "other_refusals"}
    return run(2, {name: (HERE + function, {}) for name, function in cases.items()})


def test_products_are_those_of_one_process(answers: dict[str, list[Any]]) -> None:
    wanted: list[Any] = []
    for operator in operators(batches_for(llama(), SIZES)):
        v = torch.linspace(-1, 1, operator.shape[0], dtype=operator.dtype)
        wanted += [operator @ v, slq(operator, steps=5, probes=2).nodes]
    for answer in answers["products"]:
        assert isinstance(answer, list), answer
        for found, expected in zip(answer[:-1], wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_ranks_that_differ_are_named_on_every_rank(answers: dict[str, list[Any]]) -> None:
    for answer in answers["refusals"]:
        count, weights = answer
        assert "count=0.0 of rank 1 must be positive" in count
        assert "rank 1 has other weights" in weights and "load one checkpoint on every rank" in weights


def test_ranks_with_other_operators_vectors_or_equal_batches_are_told(answers: dict[str, list[Any]]) -> None:
    for answer in answers["others"]:
        assert isinstance(answer, list) and len(answer) == 3, answer
        kind, batches, vectors = answer
        assert "rank 1 has other kind" in kind and "GGNOperator and HessianOperator" in kind
        assert "ranks [0, 1] have batches that another rank has" in batches and "DistributedSampler" in batches
        assert "vectors differ between ranks" in vectors and "same seed" in vectors


def test_ranks_with_batches_of_their_own_are_not_warned(answers: dict[str, list[Any]]) -> None:
    for answer in answers["products"]:
        assert answer[-1] == ""
