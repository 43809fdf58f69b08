"""Second moments under another partition, against means over blocks written out element by element."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizer import Layout
from optimizer.partition import Runs
from optimizer.state import blocks
from optimizer.state.blocks import axes_of, is_level, looks_coarser, rebuilt, spreads


@st.composite
def runs(draw, size: int) -> Runs:
    """Run lengths that add up to a size."""
    lengths = []
    while sum(lengths) < size:
        lengths.append(draw(st.integers(1, size - sum(lengths))))
    return Runs.of(lengths)


@st.composite
def layout_of_shape(draw, shape: tuple[int, ...]) -> Layout:
    """Any layout a shape can have: axis 0 in pieces, leading axes, runs of any lengths."""
    if not shape:
        return Layout.per_tensor(())
    fold = draw(st.sampled_from([f for f in range(1, shape[0] + 1) if shape[0] % f == 0] or [1]))
    view = shape if fold == 1 else (fold, shape[0] // fold, *shape[1:])
    axis = draw(st.integers(1 if fold > 1 else 0, len(view) - 1))
    lead = draw(st.integers(1 if fold > 1 else 0, axis))
    return Layout(axis, draw(runs(view[axis])), view[:lead], fold=fold)


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def elements(v: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An aligned second moment, one value per element."""
    if shape and v.shape[0] not in (1, shape[0]):
        v = v.repeat_interleave(shape[0] // v.shape[0], 0)
    return v.expand(shape)


def block_means(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    ids = layout.block_ids(x.shape).flatten()
    out = torch.empty(x.numel(), dtype=torch.float64)
    for block in ids.unique():
        out[ids == block] = x.flatten()[ids == block].double().mean()
    return out.reshape(x.shape)


@settings(max_examples=80, deadline=None)
@given(st.data(), shapes, st.sampled_from([1, 4, 1 << 18]))
def test_rebuilt_is_the_mean_over_the_elements_of_each_block(data, shape: tuple[int, ...], piece: int) -> None:
    """Between any two partitions of a shape, whatever the size of the pieces it is read in."""
    old, new = data.draw(layout_of_shape(shape)), data.draw(layout_of_shape(shape))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    v = torch.rand(old.aligned_shape(shape), generator=generator, dtype=torch.float64)
    v = rebuilt(v, old, shape, torch.float64)  # equal inside the old blocks
    before = v.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_PIECE", piece)
        out = rebuilt(v, new, shape, torch.float64)
    assert spreads(v.shape, shape)
    assert torch.equal(v, before)
    assert tuple(out.shape) == new.aligned_shape(shape)
    assert is_level(out, new)
    torch.testing.assert_close(elements(out, shape), block_means(elements(v, shape), new), rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.data(), shapes)
def test_unions_of_blocks_keep_the_mean_square_of_every_gradient_exact(data, shape: tuple[int, ...]) -> None:
    """What the docs promise: from elements to any blocks, a rebuilt v is the v those blocks would have accumulated."""
    from optimizer.step.update import block_mean_square

    new = data.draw(layout_of_shape(shape))
    gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = sum(0.9**i * g.square() for i, g in enumerate(gradients))
    wanted = sum(0.9**i * block_mean_square(g, new) for i, g in enumerate(gradients))
    if prod(shape):
        torch.testing.assert_close(rebuilt(old, new, shape, torch.float64), wanted, rtol=1e-12, atol=1e-300)


@settings(max_examples=80, deadline=None)
@given(st.data(), shapes.filter(prod))
def test_axes_are_one_spelling_of_each_partition(data, shape: tuple[int, ...]) -> None:
    """Equal axes exactly where every element has the same block mates."""
    a, b = data.draw(layout_of_shape(shape)), data.draw(layout_of_shape(shape))
    same = torch.equal(a.block_ids(shape), b.block_ids(shape))  # both numbered by appearance
    assert (axes_of(a, shape) == axes_of(b, shape)) == same
    assert prod(len(along) for along in axes_of(a, shape)) == a.n_blocks


def test_spellings_that_differ_and_mean_the_same() -> None:
    per_row = Layout(0, [1] * 6)
    assert axes_of(per_row, (6, 1)) == axes_of(Layout.per_element((6, 1)), (6, 1))
    assert axes_of(Layout(1, [2], (3,), fold=3), (6, 4)) == axes_of(Layout(0, [2, 2, 2]), (6, 4))
    assert axes_of(per_row, (6, 4)) != axes_of(Layout(0, [2, 2, 2]), (6, 4))


@settings(max_examples=100, deadline=None)
@given(st.data(), shapes.filter(prod))
def test_values_tell_partitions_apart(data, shape: tuple[int, ...]) -> None:
    """A finer one differs inside our blocks; a coarser one repeats over three of them, or over all."""
    layout = data.draw(layout_of_shape(shape))
    v = torch.rand(layout.aligned_shape(shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert is_level(v, layout) == all(length == 1 for length in layout.runs)
    level = rebuilt(v, layout, shape, torch.float64)
    assert is_level(level, layout)
    assert not looks_coarser(level, layout)
    assert looks_coarser(torch.full_like(level, 0.5), layout) == (layout.n_blocks > 1)
    assert not looks_coarser(torch.zeros_like(level), layout)


def test_one_coincidence_is_no_coarser_partition_and_three_are() -> None:
    layout = Layout(0, [1] * 6)
    assert not looks_coarser(torch.tensor([[1.0], [1.0], [2.0], [3.0], [4.0], [5.0]]), layout)
    assert looks_coarser(torch.tensor([[1.0], [1.0], [1.0], [3.0], [4.0], [5.0]]), layout)
    assert not looks_coarser(torch.tensor([[0.0], [0.0], [0.0], [3.0], [4.0], [5.0]]), layout)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that operations make, views of one given tensor aside."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("layout", [Layout(0, [128] * 4), Layout(1, [1] * 8192), Layout.per_tensor((512, 8192))])
def test_nothing_the_size_of_a_parameter_is_made(layout: Layout) -> None:
    """An 8 MB second moment in bf16, to a scalar per head, per column, per tensor."""
    v = torch.zeros(512, 8192, dtype=torch.bfloat16).add_(0.5)
    with Largest(v) as made:
        out = rebuilt(v, layout, (512, 8192))
    assert torch.equal(out, torch.full_like(out, 0.5))
    assert out.nbytes <= made.bytes <= 8 * blocks._PIECE


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\) cannot belong to a tensor of shape \(4, 2\)"):
        rebuilt(torch.ones(3, 1), Layout(0, [1] * 4), (4, 2))
    with pytest.raises(ValueError, match="holds 5 indices"):
        rebuilt(torch.ones(4, 1), Layout(0, [1] * 5), (4, 2))
