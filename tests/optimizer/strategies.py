"""Random layouts for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from optimizer import Layout
from optimizer.partition import FactoredLayout, Runs
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


@st.composite
def factored_layouts(draw: st.DrawFn) -> tuple[FactoredLayout, tuple[int, ...]]:
    """Random factored layouts with the shape of their tensor: leading axes, folds, parts in turn, any axis."""
    fold = draw(st.sampled_from([1, 1, 2, 3]))
    leading = draw(st.integers(0, 2)) if fold == 1 else 1
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    repeat = draw(st.integers(1, 3))
    rows = repeat * sum(lengths)
    view = [fold] if fold > 1 else [draw(st.integers(1, 3)) for _ in range(leading)]
    others = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 2)))]
    at = draw(st.integers(0, len(others)))
    matrix = [*others[:at], rows, *others[at:]]
    axis = leading + at
    view += matrix
    shape = tuple(view) if fold == 1 else (view[0] * view[1], *view[2:])
    layout = FactoredLayout(shape, axis, list(enumerate(lengths)), repeat=repeat, leading=leading, fold=fold)
    return layout, shape
