"""Runs numbered by arithmetic against runs spelt out, and what a large elementwise tensor takes."""

from __future__ import annotations

import itertools
import tracemalloc

import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer import Layout
from optimizer.partition.layout import Runs
from optimizer.sharding.flat import FlatLayout, Range, flat_geometry
from optimizer.sharding.holdings import Edges, local_runs, run_ids

SEGMENTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3).map(tuple)


@given(SEGMENTS, st.integers(1, 3), st.data())
def test_edges_are_those_of_the_runs_spelt_out(
    segments: tuple[tuple[int, int], ...], repeat: int, data: st.DataObject
) -> None:
    runs = Runs(segments, repeat)
    edges, lengths = Edges(runs), list(runs)
    of = [run for run, length in enumerate(lengths) for _ in range(length)]
    starts = {0, *itertools.accumulate(lengths)}
    assert [edges.run_of(x) for x in range(len(of) + 1)] == [*of, len(lengths)]
    assert [edges.inside(x) for x in range(len(of) + 1)] == [x not in starts for x in range(len(of) + 1)]
    assert edges.many == len(lengths)
    assert edges.lengths(torch.arange(len(lengths))).tolist() == lengths
    cuts = sorted(data.draw(st.sets(st.integers(0, len(of)), min_size=2, max_size=6)) | {0}) if len(of) > 1 else [0, 1]
    ranges = tuple(itertools.islice(itertools.pairwise(cuts), 0, None, 2))
    held = [of[x] for a, b in ranges for x in range(a, b)]
    assert run_ids(edges, ranges).tolist() == sorted(set(held))
    assert list(local_runs(runs, edges, ranges)) == [held.count(run) for run in sorted(set(held))]


def test_no_element_costs_a_python_object() -> None:
    """Elementwise, a rank of 1,000 holds a thousandth: what others hold may not be spelt out."""
    shape = (4000, 4000)
    size = 4000 * 4000 // 1000
    bounds = tuple((r * size, (r + 1) * size) for r in range(1000))
    tracemalloc.start()
    geometry = flat_geometry([Range(shape, Layout.per_element(shape), bounds, 500)], size, None, torch.device("cpu"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert geometry.cut is None and geometry.aligned == (size,)
    assert peak < 4_000_000  # a list of all elements is 128 MB and more


def test_flat_layouts_are_equal_only_with_their_ranges() -> None:
    """Both are one run of 6 along one axis; what they hold differs."""
    whole = Range((2, 3), Layout.per_element((2, 3)), ((0, 6),), 0)
    other = Range((2, 3), Layout.per_tensor((2, 3)), ((0, 6),), 0)
    shifted = Range((2, 3), Layout.per_element((2, 3)), ((0, 3), (3, 6)), 1)
    found = [
        FlatLayout((whole,), 6, ""), FlatLayout((other,), 6, ""), FlatLayout((shifted,), 6, ""), FlatLayout((), 6, ""),
        FlatLayout((whole,), 6, "0"), FlatLayout((whole,), 7, ""),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert [[one == another for another in found] for one in found] == torch.eye(len(found)).bool().tolist()
    again = FlatLayout((Range((2, 3), Layout.per_element((2, 3)), ((0, 6),), 0),), 6, "")
    assert again == found[0] and hash(again) == hash(found[0])
    assert found[0] != Layout(0, [6]) and Layout(0, [6]) != found[0]
