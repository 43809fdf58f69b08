"""Checkpoints by torch.distributed.checkpoint, from 1, 2 and 3 ranks to 1, 2 and 3; whole state between wrappers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.suite import ACROSS, FACTORED, FACTORED_ACROSS, FACTORED_SAVED, FEW_BITS_SAVED, SAVED, on_ranks
from tests.sharding.training import FINE

pytestmark = pytest.mark.timeout(900)  # the first test of a module waits for all its ranks


@on_ranks(3)
@pytest.mark.parametrize("wrap", [*SAVED, *(FACTORED + wrap for wrap in FACTORED_SAVED)])
def test_going_on_with_other_ranks_is_as_if_nothing_had_happened(results: Any, wrap: str) -> None:
    for rank, answer in enumerate(results[3][wrap]):
        assert isinstance(answer, dict), answer
        assert len(answer) == 3 * (3 - rank)
        assert max(answer.values()) <= 1e-12, answer


@on_ranks(3)
@pytest.mark.parametrize("wrap", FEW_BITS_SAVED)
def test_codes_and_scales_go_on_with_other_ranks(results: Any, wrap: str) -> None:
    for rank, answer in enumerate(results[3][f"{wrap}-few-bits"]):
        assert isinstance(answer, dict), answer
        assert len(answer) == 3 * (3 - rank)
        assert max(answer.values()) <= (1e-12 if wrap == "fsdp2" else 5e-3), answer


@on_ranks(2)
def test_whole_codes_and_scales_go_from_any_wrapper_to_any(results: Any) -> None:
    for answer in results[2]["across-few-bits"]:
        assert isinstance(answer, dict), answer
        assert len(answer) == 3 * 4
        cut = {name: value for name, value in answer.items() if "columns" in name}
        assert max(value for name, value in answer.items() if name not in cut) <= 1e-12, answer
        assert cut["fsdp2-columns to plain"] > 1e-6 and cut.pop("fsdp2-columns whole") and max(cut.values()) < 5e-3


@on_ranks(2)
@pytest.mark.parametrize("prefix", ["", FACTORED])
@pytest.mark.parametrize("name", ACROSS)
def test_whole_state_goes_from_any_wrapper_to_any(results: Any, name: str, prefix: str) -> None:
    wraps = (FACTORED_ACROSS if prefix else ACROSS)[name]
    for answer in results[2][f"across-{prefix}{name}"]:
        assert isinstance(answer, dict), answer
        assert len(answer) == len(wraps) * (1 + len(wraps))
        assert max(answer.values()) <= 1e-12, answer


@pytest.mark.parametrize("world", [pytest.param(world, marks=on_ranks(world)) for world in (2, 3)])
@pytest.mark.parametrize("wrap", ["fsdp1", "fsdp2"])
def test_sharded_state_of_adamw_is_refused_or_converted_as_in_one_process(results: Any, wrap: str, world: int) -> None:
    assert results[world][f"adamw-{wrap}"] == [FINE] * world


@on_ranks(3)
@pytest.mark.parametrize("flatten", [False, True])
def test_a_folder_of_adamw_is_converted_and_taken_by_ranks(results: Any, flatten: bool) -> None:
    assert results[3][f"folder-{flatten}"] == [FINE] * 3


@on_ranks(3)
def test_gathered_state_is_that_of_one_process(results: Any) -> None:
    assert results[3]["whole"] == [FINE] * 3
