"""Sharded training on gloo ranks against one process: parameters, and what the steps send.

A comparison of parameters cannot see a second moment that is right where it is used and wrong where it is only saved:
``test_checkpoints`` looks there.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.suite import FACTS, TRAINED, Trained, identity, on_ranks
from tests.sharding.training import FINE, STEPS

pytestmark = pytest.mark.timeout(900)  # the first test of a module waits for all its ranks

CASES = [
    pytest.param(world, case, id=f"{world}-{identity(case)}", marks=on_ranks(world))
    for world, cases in TRAINED.items()
    for case in cases
]


@pytest.mark.parametrize(("world", "case"), CASES)
def test_ten_steps_equal_one_process(results: Any, world: int, case: Trained) -> None:
    # Mixtral routes in fp32 whatever its weights are, and so differs under DDP as well.
    bar = 1e-12 if case.dtype == "float64" and case.model != "mixtral" else 1e-6
    for answer in results[world][identity(case)]:
        assert isinstance(answer, dict), answer
        assert answer["difference"] <= max(bar, case.moment[1] if case.moment else 0)


@pytest.mark.parametrize(("world", "case"), CASES)
def test_a_step_sends_at_most_one_message_per_group(results: Any, world: int, case: Trained) -> None:
    for answer in results[world][identity(case)]:
        assert isinstance(answer, dict), answer
        assert len(answer["messages"]) == STEPS * answer["groups"]
        assert answer["groups"] == (0 if case.wrap == "ddp" else 1)
        # At most 8 bytes for each block of the tensors that have a shared one; float64 needs 8 more for each tensor.
        assert all(nbytes <= answer["limit"] for _, nbytes in answer["messages"])


@on_ranks(2)
@pytest.mark.parametrize("fact", FACTS)
def test_on_two_ranks(results: Any, fact: str) -> None:
    assert results[2][fact] == [FINE] * 2
