"""Random layouts for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from optimizer import Layout
from optimizer.partition import Runs
from tests.fuzz.draw import layout_around


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """A random layout and a shape it fits: any axis, leading axes, repeated patterns, axis 0 in pieces."""
    pattern = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    runs = Runs(tuple((n, 1) for n in pattern), draw(st.integers(1, 3)))
    behind = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    before = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    leading = draw(st.integers(0, len(before)))
    return layout_around(runs, before, behind, leading, draw(st.integers(1, 3)))
