"""The Triton kernels. ``tables.py`` defines entries, programs and units, and chooses the kernels for a tensor.

Arguments that all kernels but ``prepare`` share:

    addresses  int64 [n, ADDRESSES]: addresses of each tensor's parameter, gradient, first moment, second moment,
               counter, and means of columns (0 if its second moment is not factored)
    entries    int64 [E, FIELDS]: the table of entries
    programs   int32 [P, 2]: the (entry, unit) of each program
    factors    fp32 [n, 2]: -lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of each tensor
    numbers    fp32 [6]: 1 - beta1, 1 - beta2, 1 - lr * weight_decay, eps, the factor of the gradients, and 0 to skip
               the step, else 1
    scratch    fp32: partial sums of squares
    P, G, M    dtypes of the parameter, the gradient, the first moment
    WIDTH      columns of a tile of the kernel ``rows``
    EVEN       whether all rows, runs and tensors begin and end at multiples of 16 elements
"""
# mypy: ignore-errors
# This file does not import annotations from __future__, because Triton reads annotations as objects.

import triton
import triton.language as tl

from . import tables
from .device import ADDRESSES, address, gradients, stepping, update, work

BLOCK = tl.constexpr(tables.BLOCK)
TILE = tl.constexpr(tables.TILE)
ROWS = tl.constexpr(tables.ROWS)
COLUMNS = tl.constexpr(tables.COLUMNS)
RUNS = tl.constexpr(tables.RUNS)
PARTS = tl.constexpr(tables.PARTS)
COUNTERS = tl.constexpr(128)

FIELDS = tl.constexpr(len(tables.Entry._fields))

# The columns of the table of entries, in the order of the fields of ``Entry``.
(
    TENSOR,
    NUMEL,
    AXIS,
    INNER,
    BETWEEN,
    REPEAT,
    SEGMENT_RUNS,
    PERIOD,
    FIRST,
    LENGTH,
    N_RUNS,
    CHUNKS,
    CHUNK,
    SCRATCH,
    STRIDE,
    SUMS_PER_RUN,
) = (tl.constexpr(i) for i in range(len(tables.Entry._fields)))


@triton.jit
def prepare(
    addresses,
    factors,
    numbers,
    n,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    sign: tl.float64,
    lr_at,
    beta1_at,
    beta2_at,
    decay_at,
    scale_at,
    found_inf_at,
):
    """Increment the counters and compute ``factors`` and ``numbers``.

    The bias corrections are computed in fp64, because in fp32 1 - 0.999 has an error of 6e-5. A pointer that is not
    None (``lr_at`` and so on) replaces the number of the same name.
    """
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float64)
    if beta1_at is not None:
        beta1 = tl.load(beta1_at).to(tl.float64)
    if beta2_at is not None:
        beta2 = tl.load(beta2_at).to(tl.float64)
    if decay_at is not None:
        weight_decay = tl.load(decay_at).to(tl.float64)
    unscale = sign
    if scale_at is not None:
        unscale = sign / tl.load(scale_at).to(tl.float64)
    stepped = 1.0
    if found_inf_at is not None:
        stepped = tl.where(tl.load(found_inf_at).to(tl.float32) == 0, 1.0, 0.0)
    i = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    inside = i < n
    counter = tl.load(addresses + ADDRESSES * i + 4, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=inside, other=1.0) + stepped
    tl.store(counter, step, mask=inside)
    # If the first step is skipped, the counter is 0, for which there are no corrections. They are not used then.
    step = tl.maximum(step, 1.0).to(tl.float64)
    first = 1 - _power(beta1, step)
    second = 1 - _power(beta2, step)
    # The stores convert to fp32.
    tl.store(factors + 2 * i, -lr / first, mask=inside)
    tl.store(factors + 2 * i + 1, 1 / tl.sqrt(second), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(numbers, 1 - beta1)
        tl.store(numbers + 1, 1 - beta2)
        tl.store(numbers + 2, 1 - lr * weight_decay)
        tl.store(numbers + 3, eps)
        tl.store(numbers + 4, unscale)
        tl.store(numbers + 5, stepped)


@triton.jit
def _power(base, exponent):
    """Return base ** exponent in fp64, for a base >= 0; 0 for a base of 0."""
    base = tl.full([COUNTERS], base, tl.float64)
    return tl.where(base > 0, tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def _run(entry, u):
    """Return (outer index, first index along the axis) of run number ``u`` of the entry."""
    repeat, count = tl.load(entry + REPEAT), tl.load(entry + SEGMENT_RUNS)
    outer, inside = u // (repeat * count), u % (repeat * count)
    begin = (inside // count) * tl.load(entry + PERIOD) + (inside % count) * tl.load(entry + LENGTH)
    begin += tl.load(entry + FIRST)
    return outer, begin


@triton.jit
def _second(v, mean, numbers):
    """Return beta2 * v + (1 - beta2) * mean."""
    return v + tl.load(numbers + 1) * (mean - v)


@triton.jit
def _scale(v, entry, factors, numbers):
    """Return the factor of the first moment in the update, negative to descend."""
    tensor_factors = factors + 2 * tl.load(entry + TENSOR)
    return tl.load(tensor_factors) / (tl.sqrt(v) * tl.load(tensor_factors + 1) + tl.load(numbers + 3))


# The arguments that the kernels share stay on two lines (fmt: skip), so that they can be compared at a glance.


@triton.jit
def each(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Step a tensor in which every element is a block; a unit is BLOCK elements."""
    entry, unit = work(entries, programs, FIELDS)
    param, grad = address(addresses, entry, 0, P), address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = address(addresses, entry, 2, M), address(addresses, entry, 3, tl.float32)
    offsets = unit * BLOCK + tl.arange(0, BLOCK)
    numel = tl.load(entry + NUMEL)
    if EVEN:
        numel = tl.multiple_of(numel, 16)
    mask = offsets < numel
    g = gradients(grad, offsets, mask, numbers)
    v = _second(tl.load(exp_avg_sq + offsets, mask=mask, other=0.0), g * g, numbers)
    tl.store(exp_avg_sq + offsets, v, mask=stepping(mask, numbers))
    update(param, exp_avg, offsets, mask, g, _scale(v, entry, factors, numbers), numbers)


@triton.jit
def rows(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Step contiguous runs; a unit is TILE // WIDTH runs. The second read of the gradient comes from cache."""
    entry, unit = work(entries, programs, FIELDS)
    param, grad = address(addresses, entry, 0, P), address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = address(addresses, entry, 2, M), address(addresses, entry, 3, tl.float32)
    u = unit * (TILE // WIDTH) + tl.arange(0, TILE // WIDTH)
    valid = u < tl.load(entry + N_RUNS)
    outer, begin = _run(entry, u)
    index = outer * tl.load(entry + AXIS) + begin
    inner, length = tl.load(entry + INNER), tl.load(entry + LENGTH)
    if EVEN:
        inner = tl.multiple_of(inner, 16)
    size = length * inner
    k = tl.arange(0, WIDTH)
    squares = tl.zeros([TILE // WIDTH, WIDTH], dtype=tl.float32)
    for start in range(0, size, WIDTH):
        mask = valid[:, None] & (start + k < size)[None, :]
        g = gradients(grad, (index * inner)[:, None] + start + k[None, :], mask, numbers)
        squares += g * g
    mean = tl.sum(squares, 1) / size.to(tl.float32)
    v = _second(tl.load(exp_avg_sq + index, mask=valid, other=0.0), mean, numbers)
    _spread(exp_avg_sq, index, length, v, valid, numbers, WIDTH)
    scale = _scale(v, entry, factors, numbers)[:, None]
    for start in range(0, size, WIDTH):
        mask = valid[:, None] & (start + k < size)[None, :]
        offsets = (index * inner)[:, None] + start + k[None, :]
        update(param, exp_avg, offsets, mask, gradients(grad, offsets, mask, numbers), scale, numbers)


@triton.jit
def _spread(exp_avg_sq, index, length, v, valid, numbers, WIDTH: tl.constexpr):
    """Store v of each run at all its indices, after every thread of the program has read the old values."""
    tl.debug_barrier()
    stepped = stepping(valid, numbers)
    for start in range(0, length, WIDTH):
        k = start + tl.arange(0, WIDTH)
        mask = stepped[:, None] & (k < length)[None, :]
        tl.store(exp_avg_sq + index[:, None] + k[None, :], v[:, None], mask=mask)


@triton.jit
def _chunk(entry, unit, EVEN: tl.constexpr):
    """Return (run, chunk of the run, offset of the chunk's first element, its elements) of a unit of spans."""
    inner, between = tl.load(entry + INNER), tl.load(entry + BETWEEN)
    chunks, chunk = tl.load(entry + CHUNKS), tl.load(entry + CHUNK)
    u, part = unit // (between * chunks), unit % (between * chunks)
    outer, begin = _run(entry, u)
    start = (part % chunks) * chunk
    row = outer * between + part // chunks
    offset = (row * tl.load(entry + AXIS) + begin) * inner + start
    size = tl.minimum(chunk, tl.load(entry + LENGTH) * inner - start)
    if EVEN:
        offset, size = tl.multiple_of(offset, 16), tl.multiple_of(size, 16)
    return u, part, offset, size


@triton.jit
def span_sums(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute the sums of squares of chunks of long runs; a unit is a chunk."""
    entry, unit = work(entries, programs, FIELDS)
    grad = address(addresses, entry, 1, G)
    u, part, offset, size = _chunk(entry, unit, EVEN)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        g = gradients(grad, offset + k, k < size, numbers)
        squares += g * g
    tl.store(scratch + tl.load(entry + SCRATCH) + part * tl.load(entry + STRIDE) + u, tl.sum(squares, 0))


@triton.jit
def span_update(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Update a chunk of a long run; a unit is a chunk."""
    entry, unit = work(entries, programs, FIELDS)
    param, grad = address(addresses, entry, 0, P), address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = address(addresses, entry, 2, M), address(addresses, entry, 3, tl.float32)
    u, _, offset, size = _chunk(entry, unit, EVEN)
    outer, begin = _run(entry, u)
    scale = _scale(tl.load(exp_avg_sq + outer * tl.load(entry + AXIS) + begin), entry, factors, numbers)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        g = gradients(grad, offset + k, k < size, numbers)
        update(param, exp_avg, offset + k, k < size, g, scale, numbers)


@triton.jit
def column_sums(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sum squares down the columns of [between][axis * inner]; a unit is COLUMNS columns of ROWS rows."""
    entry, unit = work(entries, programs, FIELDS)
    grad = address(addresses, entry, 1, G)
    width, between = tl.load(entry + AXIS) * tl.load(entry + INNER), tl.load(entry + BETWEEN)
    if EVEN:
        width = tl.multiple_of(width, 16)
    chunks = tl.load(entry + CHUNKS)
    part, tile = unit % chunks, unit // chunks
    tiles = (width + COLUMNS - 1) // COLUMNS
    outer, column = tile // tiles, (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    squares = tl.zeros([16, COLUMNS], dtype=tl.float32)
    for start in range(0, ROWS, 16):
        row = part * ROWS + start + tl.arange(0, 16)
        mask = (row < between)[:, None] & (column < width)[None, :]
        g = gradients(grad, ((outer * between + row) * width)[:, None] + column[None, :], mask, numbers)
        squares += g * g
    sums = scratch + tl.load(entry + SCRATCH) + part * tl.load(entry + STRIDE) + outer * width + column
    tl.store(sums, tl.sum(squares, 0), mask=column < width)


@triton.jit
def column_update(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Update elements, each with the second moment of its index along the axis; a unit is BLOCK elements."""
    entry, unit = work(entries, programs, FIELDS)
    param, grad = address(addresses, entry, 0, P), address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = address(addresses, entry, 2, M), address(addresses, entry, 3, tl.float32)
    axis, inner, between = tl.load(entry + AXIS), tl.load(entry + INNER), tl.load(entry + BETWEEN)
    offsets = unit * BLOCK + tl.arange(0, BLOCK)
    numel = tl.load(entry + NUMEL)
    if EVEN:
        numel = tl.multiple_of(numel, 16)
    mask = offsets < numel
    index = offsets // (between * axis * inner) * axis + offsets // inner % axis
    v = tl.load(exp_avg_sq + index, mask=mask, other=0.0)
    g = gradients(grad, offsets, mask, numbers)
    update(param, exp_avg, offsets, mask, g, _scale(v, entry, factors, numbers), numbers)


@triton.jit
def seconds(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute second moments from partial sums, which are added in a fixed order; a unit is RUNS runs."""
    entry, unit = work(entries, programs, FIELDS)
    exp_avg_sq = address(addresses, entry, 3, tl.float32)
    u = unit * RUNS + tl.arange(0, RUNS)
    valid = u < tl.load(entry + N_RUNS)
    outer, begin = _run(entry, u)
    index = outer * tl.load(entry + AXIS) + begin
    inner, between, length = tl.load(entry + INNER), tl.load(entry + BETWEEN), tl.load(entry + LENGTH)
    per_run, stride = tl.load(entry + SUMS_PER_RUN), tl.load(entry + STRIDE)
    # Spans have one sum per run and chunk, indexed by run. Columns have one per column and chunk, indexed by column.
    by_run = per_run == 0
    parts = tl.where(by_run, between, 1) * tl.load(entry + CHUNKS)
    first = tl.load(entry + SCRATCH) + tl.where(by_run, u, index * inner)
    sums = tl.zeros([RUNS, PARTS], dtype=tl.float32)
    for j in range(0, tl.maximum(per_run, 1)):
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            mask = valid[:, None] & (part < parts)[None, :]
            sums += tl.load(scratch + (first + j)[:, None] + (part * stride)[None, :], mask=mask, other=0.0)
    mean = tl.sum(sums, 1) / (between * length * inner).to(tl.float32)
    v = _second(tl.load(exp_avg_sq + index, mask=valid, other=0.0), mean, numbers)
    _spread(exp_avg_sq, index, length, v, valid, numbers, PARTS)
