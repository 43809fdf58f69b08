"""The search for the largest batch under a cap: the answer fits, one row more does not, and both were measured."""

from __future__ import annotations

import pytest

from benchmarks.largest_batch import MOST, largest
from benchmarks.sft_memory_page import fitting, largest_batch


@pytest.mark.parametrize("cap", [50, 100, 119, 120, 121, 777, 10_000])
def test_the_largest_that_fits_is_found_and_its_neighbour_was_tried(cap: int) -> None:
    calls: list[int] = []
    tried = largest(cap, lambda rows: calls.append(rows) or 100 + 20 * rows)
    expected = max(0, min(64, (cap - 100) // 20))
    assert fitting(tried, cap) == expected and len(calls) == len(set(calls)) < 14
    assert expected == MOST or expected + 1 in tried


def test_the_table_names_what_was_measured() -> None:
    tried = {str(rows): size * 10**6 for rows, size in largest(777, lambda rows: 100 + 20 * rows).items()}
    text = largest_batch({"cap": 777 * 10**6, "length": 256, "rows": {"AdamW": tried}})
    assert "| AdamW | 33 x 256 tokens | 760 | 780 |" in text and "cap of 777 MB" in text
