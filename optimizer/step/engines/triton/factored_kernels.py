"""The Triton kernels for factored second moments. ``factored_tables.py`` defines tiles, entries and units.

The arguments are those of ``kernels.py``; WIDTH and EVEN are not used, because each entry tells the form of its tiles.
"""
# mypy: ignore-errors
# This file does not import annotations from __future__, because Triton reads annotations as objects.

import triton
import triton.language as tl

from . import factored_tables
from .device import address, gradients, stepping, update, work

WIDE_SLOW, WIDE_STEP, WIDE_FAST = (tl.constexpr(n) for n in factored_tables.WIDE)
NARROW_SLOW, NARROW_STEP, NARROW_FAST = (tl.constexpr(n) for n in factored_tables.NARROW)
MEANS = tl.constexpr(factored_tables.MEANS)
SUMS = tl.constexpr(factored_tables.SUMS)
PARTIAL_MEANS = tl.constexpr(factored_tables.PARTIAL_MEANS)
ROW_MEANS = tl.constexpr(factored_tables.ROW_MEANS)
COLUMN_MEANS = tl.constexpr(factored_tables.COLUMN_MEANS)

# The columns of the tables of entries, in the order of the fields of ``Tile`` and of ``Means``.
TILE_FIELDS = tl.constexpr(len(factored_tables.Tile._fields))
(
    TENSOR,
    WIDE,
    ROWS_ARE_FAST,
    AXIS,
    INNER,
    BETWEEN,
    REPEAT,
    PERIOD,
    FIRST,
    LENGTH,
    PARTS,
    PART,
    ROW_SUMS,
    ROW_STRIDE,
    COLUMN_SUMS,
    COLUMN_STRIDE,
    FIRST_TILE,
    TILES,
    PARTIALS,
    N_PARTIALS,
    COLUMNS,
) = (tl.constexpr(i) for i in range(len(factored_tables.Tile._fields)))
MEANS_FIELDS = tl.constexpr(len(factored_tables.Means._fields))
(
    _,
    MEAN_WHICH,
    MEAN_LENGTH,
    MEAN_OUTER,
    MEAN_SUMS,
    MEAN_STRIDE,
    MEAN_TILES,
    MEAN_SIZE,
    MEAN_INNER,
    MEAN_STEP,
    MEAN_FIRST,
    MEAN_PARTIALS,
) = (tl.constexpr(i) for i in range(len(factored_tables.Means._fields)))


@triton.jit
def _tile(entry, unit, SLOW: tl.constexpr, FAST: tl.constexpr):
    """Return where a unit's tile lies.

    Returns:
        (outer index; index of between, 0 if the rows are fast; number of the piece among those of the outer index;
        number of the tile along the slow direction; number along the fast direction).
    """
    rows_are_fast = tl.load(entry + ROWS_ARE_FAST) != 0
    slow_size, fast_size, _ = _extents(entry)
    slow_tiles, fast_tiles = (slow_size + SLOW - 1) // SLOW, (fast_size + FAST - 1) // FAST
    fast, rest = unit % fast_tiles, unit // fast_tiles
    slow, rest = rest % slow_tiles, rest // slow_tiles
    lines = tl.where(rows_are_fast, 1, tl.load(entry + BETWEEN))
    line, rest = rest % lines, rest // lines
    repeat = tl.load(entry + REPEAT)
    turn, outer = rest % repeat, rest // repeat
    return outer, line, turn, slow, fast


@triton.jit
def _extents(entry):
    """Return (size of the slow direction, size of the fast one, distance in memory of neighbours in the slow one)."""
    rows_are_fast = tl.load(entry + ROWS_ARE_FAST) != 0
    length, inner = tl.load(entry + LENGTH), tl.load(entry + INNER)
    slow_size = tl.where(rows_are_fast, tl.load(entry + BETWEEN), length)
    fast_size = tl.where(rows_are_fast, length, inner)
    return slow_size, fast_size, tl.where(rows_are_fast, tl.load(entry + AXIS), inner)


@triton.jit
def _origin(entry, outer, line, turn):
    """Return the (element, row, column) at which the piece begins, each counted in the whole tensor.

    A column is counted without the parts: there are outer * between * inner of them.
    """
    axis, inner = tl.load(entry + AXIS), tl.load(entry + INNER)
    first = tl.load(entry + FIRST) + turn * tl.load(entry + PERIOD)
    line = outer * tl.load(entry + BETWEEN) + line
    return (line * axis + first) * inner, outer * axis + first, line * inner


@triton.jit
def _elements(entry, element, fast, FAST: tl.constexpr, EVEN: tl.constexpr):
    """Return (first element, distance between slow neighbours, indices along the fast direction, size of that)."""
    _, fast_size, stride = _extents(entry)
    if EVEN:
        # A multiplication tells the compiler what it may assume. It would forget tl.multiple_of of an argument.
        element, stride, fast_size = element // 16 * 16, stride // 16 * 16, fast_size // 16 * 16
    return element, stride, fast * FAST + tl.arange(0, FAST), fast_size


@triton.jit
def _sums_of_tile(
    entry, unit, grad, numbers, scratch,
    SLOW: tl.constexpr, STEP: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store the sums of squares of a tile over each of its directions."""
    outer, line, turn, slow, fast = _tile(entry, unit, SLOW, FAST)
    element, row, column = _origin(entry, outer, line, turn)
    element, stride, f, fast_size = _elements(entry, element, fast, FAST, EVEN)
    slow_size, _, _ = _extents(entry)
    rows_are_fast = tl.load(entry + ROWS_ARE_FAST) != 0
    across = tl.where(rows_are_fast, slow, line * ((fast_size + FAST - 1) // FAST) + fast)
    along = tl.load(entry + FIRST_TILE) + turn * tl.load(entry + TILES) + tl.where(rows_are_fast, fast, slow)
    row_sums = tl.load(entry + ROW_SUMS) + across * tl.load(entry + ROW_STRIDE) + row
    column_sums = tl.load(entry + COLUMN_SUMS) + along * tl.load(entry + COLUMN_STRIDE) + column
    slow_sums = scratch + tl.where(rows_are_fast, column_sums, row_sums)
    fast_sums = scratch + tl.where(rows_are_fast, row_sums, column_sums)
    sums = tl.zeros([STEP, FAST], dtype=tl.float32)
    for start in range(slow * SLOW, tl.minimum(slow * SLOW + SLOW, slow_size), STEP):
        s = start + tl.arange(0, STEP)
        mask = (s < slow_size)[:, None] & (f < fast_size)[None, :]
        g = gradients(grad, element + s[:, None] * stride + f[None, :], mask, numbers)
        squares = g * g
        sums += squares
        tl.store(slow_sums + s, tl.sum(squares, 1), mask=s < slow_size)
    tl.store(fast_sums + f, tl.sum(sums, 0), mask=f < fast_size)


# The arguments that the kernels share stay on two lines (fmt: skip), so that they can be compared at a glance.


@triton.jit
def factored_sums(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute the sums of squares of the rows and of the columns of a tile; a unit is a tile."""
    entry, unit = work(entries, programs, TILE_FIELDS)
    grad = address(addresses, entry, 1, G)
    if tl.load(entry + WIDE) != 0:
        _sums_of_tile(entry, unit, grad, numbers, scratch, WIDE_SLOW, WIDE_STEP, WIDE_FAST, True)
    else:
        _sums_of_tile(entry, unit, grad, numbers, scratch, NARROW_SLOW, NARROW_STEP, NARROW_FAST, False)


@triton.jit
def factored_moments(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Update means from the sums of tiles, which are added in a fixed order; a unit is MEANS means.

    It stores the sum of its new means, from which ``factored_update`` computes the mean of all of them.
    """
    entry, unit = work(entries, programs, MEANS_FIELDS)
    moment = address(addresses, entry, tl.load(entry + MEAN_WHICH), tl.float32)
    length, tiles, stride = tl.load(entry + MEAN_LENGTH), tl.load(entry + MEAN_TILES), tl.load(entry + MEAN_STRIDE)
    units = (length + MEANS - 1) // MEANS
    k = (unit % units) * MEANS + tl.arange(0, MEANS)
    valid = k < length
    at = (unit // units) * length + k
    sums = tl.zeros([SUMS, MEANS], dtype=tl.float32)
    for start in range(0, tiles, SUMS):
        tile = start + tl.arange(0, SUMS)
        mask = (tile < tiles)[:, None] & valid[None, :]
        sums += tl.load(
            scratch + tl.load(entry + MEAN_SUMS) + (tile * stride)[:, None] + at[None, :], mask=mask, other=0.0
        )
    mean = tl.sum(sums, 0) / tl.load(entry + MEAN_SIZE).to(tl.float32)
    inner = tl.load(entry + MEAN_INNER)
    index = tl.load(entry + MEAN_FIRST) + at // inner * tl.load(entry + MEAN_STEP) + at % inner
    share = tl.load(numbers + 1)
    # A moment that is infinite stays so. It would become NaN, if a difference to the mean were added to it.
    v = (1 - share) * tl.load(moment + index, mask=valid, other=0.0) + share * mean
    tl.store(moment + index, v, mask=stepping(valid, numbers))
    partials = tl.load(entry + MEAN_PARTIALS)
    tl.store(scratch + partials + unit, tl.sum(tl.where(valid, v, 0.0), 0), mask=partials >= 0)


@triton.jit
def _mean_of_columns(entry, outer, scratch):
    """Return the mean of the part's column means, which is that of its row means."""
    count = tl.load(entry + N_PARTIALS)
    sums = tl.zeros([PARTIAL_MEANS], dtype=tl.float32)
    for start in range(0, count, PARTIAL_MEANS):
        k = start + tl.arange(0, PARTIAL_MEANS)
        sums += tl.load(scratch + tl.load(entry + PARTIALS) + outer * count + k, mask=k < count, other=0.0)
    return tl.sum(sums, 0) / tl.load(entry + COLUMNS).to(tl.float32)


@triton.jit
def _root(moment, index, mask, divisor, mean):
    """Return the root of means of rows, or of columns divided by the mean; infinite if the mean is."""
    return tl.where(mean == float("inf"), mean, tl.sqrt(tl.load(moment + index, mask=mask, other=0.0) / divisor))


@triton.jit
def _update_tile(
    addresses, entry, unit, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    SLOW: tl.constexpr, STEP: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Update first moments and parameters of a tile. The root of v is a root of a row times one of a column."""
    param, grad = address(addresses, entry, 0, P), address(addresses, entry, 1, G)
    exp_avg = address(addresses, entry, 2, M)
    outer, line, turn, slow, fast = _tile(entry, unit, SLOW, FAST)
    element, row, column = _origin(entry, outer, line, turn)
    element, stride, f, fast_size = _elements(entry, element, fast, FAST, EVEN)
    slow_size, _, _ = _extents(entry)
    rows_are_fast = tl.load(entry + ROWS_ARE_FAST) != 0
    mean = _mean_of_columns(entry, outer, scratch)
    divisor = tl.where(mean == 0, 1.0, mean)  # if the mean is zero, so are all means
    inner, parts = tl.load(entry + INNER), tl.load(entry + PARTS)
    column = column // inner * (inner * parts) + tl.load(entry + PART) * inner
    slow_at, fast_at = tl.where(rows_are_fast, column, row), tl.where(rows_are_fast, row, column)
    slow_means = address(addresses, entry, tl.where(rows_are_fast, COLUMN_MEANS, ROW_MEANS), tl.float32)
    fast_means = address(addresses, entry, tl.where(rows_are_fast, ROW_MEANS, COLUMN_MEANS), tl.float32)
    apart = tl.where(rows_are_fast, parts, 1)
    factor = factors + 2 * tl.load(entry + TENSOR)
    root = _root(fast_means, fast_at + f, f < fast_size, tl.where(rows_are_fast, 1.0, divisor), mean)
    root *= tl.load(factor + 1)
    for start in range(slow * SLOW, tl.minimum(slow * SLOW + SLOW, slow_size), STEP):
        s = start + tl.arange(0, STEP)
        mask = (s < slow_size)[:, None] & (f < fast_size)[None, :]
        other = _root(slow_means, slow_at + s * apart, s < slow_size, tl.where(rows_are_fast, divisor, 1.0), mean)
        scale = tl.load(factor) / (other[:, None] * root[None, :] + tl.load(numbers + 3))
        offsets = element + s[:, None] * stride + f[None, :]
        update(param, exp_avg, offsets, mask, gradients(grad, offsets, mask, numbers), scale, numbers)


@triton.jit
def factored_update(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Update first moments and parameters; a unit is a tile."""
    entry, unit = work(entries, programs, TILE_FIELDS)
    if tl.load(entry + WIDE) != 0:
        _update_tile(addresses, entry, unit, factors, numbers, scratch, P, G, M, WIDE_SLOW, WIDE_STEP, WIDE_FAST, True)
    else:
        _update_tile(
            addresses, entry, unit, factors, numbers, scratch, P, G, M, NARROW_SLOW, NARROW_STEP, NARROW_FAST, False
        )
