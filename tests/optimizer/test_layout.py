"""Runs and layouts: the compressed form says the same as the plain list, and block ids are what callers count on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizer import Layout, partition
from optimizer.partition import Runs

lengths = st.lists(st.integers(1, 5), min_size=1, max_size=20)


@given(lengths, st.integers(1, 4))
def test_runs_say_what_the_list_says(plain: list[int], repeat: int) -> None:
    runs = Runs.of(plain * repeat)
    assert list(runs) == plain * repeat == runs.lengths().tolist()
    assert len(runs) == len(plain) * repeat and runs.total == sum(plain) * repeat
    assert runs == Runs(tuple((n, 1) for n in plain), repeat)


def test_compression_is_small() -> None:
    heads = Layout(axis=0, runs=[128] * 64)
    neox = Layout(axis=0, runs=([8, 8] + [1] * 8) * 32)
    assert heads.runs.segments == ((128, 64),) and heads.runs.repeat == 1
    assert neox.runs.segments == ((8, 2), (1, 8)) and neox.runs.repeat == 32
    assert neox.n_blocks == 32 * 10


@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(0, 1))
def test_block_ids_number_the_runs_in_order(plain: list[int], experts: int, width: int, extra: int) -> None:
    size = sum(plain)
    shape = (experts, size, width) if extra else (size, width)
    layout = Layout(extra, plain, leading=(experts,) if extra else ())
    ids = layout.block_ids(shape)
    assert ids.dtype == torch.int64 and tuple(ids.shape) == shape
    seen = list(dict.fromkeys(ids.flatten().tolist()))
    assert seen == list(range(layout.n_blocks))
    expected = [i for i, n in enumerate(plain) for _ in range(n)]
    assert ids.reshape(-1, size, width)[0, :, 0].tolist() == expected


def test_columns_and_elements() -> None:
    assert Layout(1, [1, 2]).block_ids((2, 3)).tolist() == [[0, 1, 1], [0, 1, 1]]
    assert Layout.per_element((2, 2)).block_ids((2, 2)).tolist() == [[0, 1], [2, 3]]
    assert Layout.per_tensor((2, 2)).n_blocks == 1
    assert Layout.per_element(()).block_ids(()).item() == 0


def test_aligned_shape_broadcasts() -> None:
    assert Layout(1, [2, 2], leading=(3,)).aligned_shape((3, 4, 5)) == (3, 4, 1)
    assert Layout(1, [1] * 5).aligned_shape((7, 5)) == (1, 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layout(0, [0, 2]), ["lengths >= 1"]),
        (lambda: Layout(0, [2], leading=(3,)), ["axis=0"]),
        (lambda: Layout(0, [2, 2]).block_ids((5, 3)), ["(5, 3)", "4 indices"]),
    ],
)
def test_bad_layouts_are_named(make, words) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_an_axis_that_holds_experts_one_behind_the_other() -> None:
    """(expert x hidden, out), used transposed: a block is one output column of one expert."""
    layout = Layout(2, [1, 1, 1], leading=(2,), fold=2)
    assert layout.n_blocks == 6 and layout.aligned_shape((8, 3)) == (2, 3)
    assert layout.block_ids((8, 3)).tolist() == [[0, 1, 2]] * 4 + [[3, 4, 5]] * 4
    assert layout.fits((8, 3)) and not layout.fits((7, 3)) and not layout.fits((8, 4))
    assert layout != Layout(2, [1, 1, 1], leading=(2,))
    with pytest.raises(ValueError, match=r"shape \(7, 3\).*2 piece"):
        layout.require((7, 3))
    with pytest.raises(ValueError, match=r"fold=2.*first leading axis"):
        Layout(2, [1, 1, 1], fold=2)


def test_grouped_transposed_convolutions_by_what_they_do() -> None:
    """An output channel is moved by exactly the weights of its block."""
    convolution = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    layout = partition(convolution)["weight"]
    ids = layout.block_ids(convolution.weight.shape)
    assert layout.n_blocks == 4 and convolution.weight.shape == (6, 2, 3, 3)
    x = torch.rand(1, 6, 5, 5) + 0.1
    for channel in range(4):
        (grad,) = torch.autograd.grad(convolution(x)[0, channel].sum(), convolution.weight)
        assert ids[grad != 0].unique().tolist() == [channel] and int((grad != 0).sum()) == int((ids == channel).sum())


def test_refines_is_what_the_block_numbers_say() -> None:
    shape = (4, 6)
    found = [
        Layout.per_tensor(shape), Layout.per_element(shape), Layout(0, [1] * 4), Layout(0, [2, 2]),
        Layout(0, [1, 2, 1]), Layout(1, [1] * 6), Layout(1, [2, 4]), Layout(1, [3, 3], (4,)),
        Layout(1, [2, 1, 3], (4,)), Layout(1, [6], (4,)), Layout(1, [2], (2,), fold=2), Layout(1, [1, 1], (2,), fold=2),
    ]  # fmt: skip
    for one in found:
        for other in found:
            ids = torch.stack([layout.block_ids(shape).flatten() for layout in (one, other)])
            finer = ids.unique(dim=1).shape[1] == one.n_blocks
            assert one.refines(other, shape) is finer or (not one.refines(other, shape) and one.fold != other.fold)
    assert Layout.per_tensor(()).refines(Layout.per_element(()), ())
