"""The kernels. Every function here is in Triton's dialect; the names are those of ``tables.py``.

Arguments they share:

    addresses  int64 [n, 5]: of each tensor's parameter, gradient, first moment, second moment, counter
    entries    int64 [E, FIELDS], programs int32 [P, 2]: what the program does
    factors    fp32 [n, 2]: -lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t) of each tensor
    numbers    fp32 [6]: 1 - beta1, 1 - beta2, 1 - lr * weight_decay, eps, what gradients are multiplied by, 1 to step
    P, G, M    types of the parameter, the gradient, the first moment
    WIDTH      columns of a tile of rows
    EVEN       everything begins and ends at multiples of 16 elements
"""
# mypy: ignore-errors
# Annotations must stay objects here: Triton reads them.

import triton
import triton.language as tl

from . import tables

BLOCK = tl.constexpr(tables.BLOCK)
TILE = tl.constexpr(tables.TILE)
ROWS = tl.constexpr(tables.ROWS)
COLUMNS = tl.constexpr(tables.COLUMNS)
RUNS = tl.constexpr(tables.RUNS)
PARTS = tl.constexpr(tables.PARTS)
COUNTERS = tl.constexpr(128)

FIELDS = tl.constexpr(len(tables.Entry._fields))
(TENSOR, NUMEL, AXIS, INNER, BETWEEN, REPEAT, ALIKE, PERIOD, FIRST, LENGTH, N_RUNS, PIECES, PIECE, SCRATCH, STRIDE,
 SUMMED) = (tl.constexpr(i) for i in range(len(tables.Entry._fields)))  # fmt: skip


@triton.jit
def prepare(
    addresses, factors, numbers, n, lr: tl.float64, beta1: tl.float64, beta2: tl.float64, weight_decay: tl.float64,
    eps: tl.float64, sign: tl.float64, lr_at, beta1_at, beta2_at, decay_at, scale_at, found_inf_at,
):  # fmt: skip
    """Advance the counters; bias corrections in fp64: in fp32, 1 - 0.999 is 6e-5 off."""
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
    go = 1.0
    if found_inf_at is not None:
        go = tl.where(tl.load(found_inf_at).to(tl.float32) == 0, 1.0, 0.0)
    i = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    inside = i < n
    counter = tl.load(addresses + 5 * i + 4, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=inside, other=1.0) + go
    tl.store(counter, step, mask=inside)
    step = tl.maximum(step, 1.0).to(tl.float64)  # a skipped first step has no corrections, and needs none
    first = 1 - _power(beta1, step)
    second = 1 - _power(beta2, step)
    # Stores cast to fp32.
    tl.store(factors + 2 * i, -lr / first, mask=inside)
    tl.store(factors + 2 * i + 1, 1 / tl.sqrt(second), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(numbers, 1 - beta1)
        tl.store(numbers + 1, 1 - beta2)
        tl.store(numbers + 2, 1 - lr * weight_decay)
        tl.store(numbers + 3, eps)
        tl.store(numbers + 4, unscale)
        tl.store(numbers + 5, go)


@triton.jit
def _power(base, exponent):
    base = tl.full([COUNTERS], base, tl.float64)
    return tl.where(base > 0, tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def _work(entries, programs):
    """(the program's entry, its unit)."""
    at = programs + 2 * tl.program_id(0).to(tl.int64)
    return entries + tl.load(at).to(tl.int64) * FIELDS, tl.load(at + 1).to(tl.int64)


@triton.jit
def _address(addresses, entry, which: tl.constexpr, dtype: tl.constexpr):
    address = tl.load(addresses + 5 * tl.load(entry + TENSOR) + which)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)  # so says ``accepts``: several numbers per load


@triton.jit
def _run(entry, u):
    """(outer index, index along the axis at which it begins) of run number u of the entry."""
    repeat, alike = tl.load(entry + REPEAT), tl.load(entry + ALIKE)
    outer, inside = u // (repeat * alike), u % (repeat * alike)
    begin = (inside // alike) * tl.load(entry + PERIOD) + (inside % alike) * tl.load(entry + LENGTH)
    begin += tl.load(entry + FIRST)
    return outer, begin


@triton.jit
def _stepped(mask, numbers):
    """The mask, all false where the step is skipped."""
    return mask & (tl.load(numbers + 5).to(tl.int32) != 0)


@triton.jit
def _second(v, mean, numbers):
    return v + tl.load(numbers + 1) * (mean - v)


@triton.jit
def _scale(v, entry, factors, numbers):
    """What the first moment is multiplied by."""
    own = factors + 2 * tl.load(entry + TENSOR)
    return tl.load(own) / (tl.sqrt(v) * tl.load(own + 1) + tl.load(numbers + 3))


@triton.jit
def _gradient(grad, offsets, mask, numbers):
    return tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(numbers + 4)


@triton.jit
def _update(param, exp_avg, offsets, mask, g, scale, numbers):
    """Weight decay, first moment and step; fp32 inside, rounded once each."""
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    m = m + tl.load(numbers) * (g - m)
    p = tl.load(numbers + 2) * p + m * scale
    go = _stepped(mask, numbers)
    tl.store(exp_avg + offsets, m.to(exp_avg.dtype.element_ty), mask=go)
    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=go)


@triton.jit
def each(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Every element its own block; a unit is BLOCK elements."""
    entry, unit = _work(entries, programs)
    param, grad = _address(addresses, entry, 0, P), _address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = _address(addresses, entry, 2, M), _address(addresses, entry, 3, tl.float32)
    offsets = unit * BLOCK + tl.arange(0, BLOCK)
    numel = tl.load(entry + NUMEL)
    if EVEN:
        numel = tl.multiple_of(numel, 16)
    mask = offsets < numel
    g = _gradient(grad, offsets, mask, numbers)
    v = _second(tl.load(exp_avg_sq + offsets, mask=mask, other=0.0), g * g, numbers)
    tl.store(exp_avg_sq + offsets, v, mask=_stepped(mask, numbers))
    _update(param, exp_avg, offsets, mask, g, _scale(v, entry, factors, numbers), numbers)


@triton.jit
def rows(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Contiguous runs; a unit is TILE // WIDTH of them. The gradient's second read comes from cache."""
    entry, unit = _work(entries, programs)
    param, grad = _address(addresses, entry, 0, P), _address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = _address(addresses, entry, 2, M), _address(addresses, entry, 3, tl.float32)
    u = unit * (TILE // WIDTH) + tl.arange(0, TILE // WIDTH)
    there = u < tl.load(entry + N_RUNS)
    outer, begin = _run(entry, u)
    index = outer * tl.load(entry + AXIS) + begin
    inner, length = tl.load(entry + INNER), tl.load(entry + LENGTH)
    if EVEN:
        inner = tl.multiple_of(inner, 16)
    size = length * inner
    k = tl.arange(0, WIDTH)
    squares = tl.zeros([TILE // WIDTH, WIDTH], dtype=tl.float32)
    for start in range(0, size, WIDTH):
        mask = there[:, None] & (start + k < size)[None, :]
        g = _gradient(grad, (index * inner)[:, None] + start + k[None, :], mask, numbers)
        squares += g * g
    mean = tl.sum(squares, 1) / size.to(tl.float32)
    v = _second(tl.load(exp_avg_sq + index, mask=there, other=0.0), mean, numbers)
    _spread(exp_avg_sq, index, length, v, there, numbers, WIDTH)
    scale = _scale(v, entry, factors, numbers)[:, None]
    for start in range(0, size, WIDTH):
        mask = there[:, None] & (start + k < size)[None, :]
        offsets = (index * inner)[:, None] + start + k[None, :]
        _update(param, exp_avg, offsets, mask, _gradient(grad, offsets, mask, numbers), scale, numbers)


@triton.jit
def _spread(exp_avg_sq, index, length, v, there, numbers, WIDTH: tl.constexpr):
    """Store v of each run at all its indices, when every thread of the program has read the old one."""
    tl.debug_barrier()
    go = _stepped(there, numbers)
    for start in range(0, length, WIDTH):
        k = start + tl.arange(0, WIDTH)
        mask = go[:, None] & (k < length)[None, :]
        tl.store(exp_avg_sq + index[:, None] + k[None, :], v[:, None], mask=mask)


@triton.jit
def _piece(entry, unit, EVEN: tl.constexpr):
    """(run, piece of it, offset of the piece's first element, elements) of a unit of spans."""
    inner, between = tl.load(entry + INNER), tl.load(entry + BETWEEN)
    pieces, piece = tl.load(entry + PIECES), tl.load(entry + PIECE)
    u, part = unit // (between * pieces), unit % (between * pieces)
    outer, begin = _run(entry, u)
    start = (part % pieces) * piece
    row = outer * between + part // pieces
    offset = (row * tl.load(entry + AXIS) + begin) * inner + start
    size = tl.minimum(piece, tl.load(entry + LENGTH) * inner - start)
    if EVEN:
        offset, size = tl.multiple_of(offset, 16), tl.multiple_of(size, 16)
    return u, part, offset, size


@triton.jit
def span_sums(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of squares of pieces of long runs; a unit is a piece."""
    entry, unit = _work(entries, programs)
    grad = _address(addresses, entry, 1, G)
    u, part, offset, size = _piece(entry, unit, EVEN)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        g = _gradient(grad, offset + k, k < size, numbers)
        squares += g * g
    tl.store(scratch + tl.load(entry + SCRATCH) + part * tl.load(entry + STRIDE) + u, tl.sum(squares, 0))


@triton.jit
def span_update(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The update of a piece of a long run."""
    entry, unit = _work(entries, programs)
    param, grad = _address(addresses, entry, 0, P), _address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = _address(addresses, entry, 2, M), _address(addresses, entry, 3, tl.float32)
    u, _, offset, size = _piece(entry, unit, EVEN)
    outer, begin = _run(entry, u)
    scale = _scale(tl.load(exp_avg_sq + outer * tl.load(entry + AXIS) + begin), entry, factors, numbers)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        g = _gradient(grad, offset + k, k < size, numbers)
        _update(param, exp_avg, offset + k, k < size, g, scale, numbers)


@triton.jit
def column_sums(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of squares down the columns of [between][axis * inner]; a unit is COLUMNS columns of ROWS rows."""
    entry, unit = _work(entries, programs)
    grad = _address(addresses, entry, 1, G)
    width, between = tl.load(entry + AXIS) * tl.load(entry + INNER), tl.load(entry + BETWEEN)
    if EVEN:
        width = tl.multiple_of(width, 16)
    pieces = tl.load(entry + PIECES)
    part, tile = unit % pieces, unit // pieces
    tiles = (width + COLUMNS - 1) // COLUMNS
    outer, column = tile // tiles, (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    squares = tl.zeros([16, COLUMNS], dtype=tl.float32)
    for start in range(0, ROWS, 16):
        row = part * ROWS + start + tl.arange(0, 16)
        mask = (row < between)[:, None] & (column < width)[None, :]
        g = _gradient(grad, ((outer * between + row) * width)[:, None] + column[None, :], mask, numbers)
        squares += g * g
    at = scratch + tl.load(entry + SCRATCH) + part * tl.load(entry + STRIDE) + outer * width + column
    tl.store(at, tl.sum(squares, 0), mask=column < width)


@triton.jit
def column_update(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The update of BLOCK elements, each with the second moment of its index."""
    entry, unit = _work(entries, programs)
    param, grad = _address(addresses, entry, 0, P), _address(addresses, entry, 1, G)
    exp_avg, exp_avg_sq = _address(addresses, entry, 2, M), _address(addresses, entry, 3, tl.float32)
    axis, inner, between = tl.load(entry + AXIS), tl.load(entry + INNER), tl.load(entry + BETWEEN)
    offsets = unit * BLOCK + tl.arange(0, BLOCK)
    numel = tl.load(entry + NUMEL)
    if EVEN:
        numel = tl.multiple_of(numel, 16)
    mask = offsets < numel
    index = offsets // (between * axis * inner) * axis + offsets // inner % axis
    v = tl.load(exp_avg_sq + index, mask=mask, other=0.0)
    g = _gradient(grad, offsets, mask, numbers)
    _update(param, exp_avg, offsets, mask, g, _scale(v, entry, factors, numbers), numbers)


@triton.jit
def seconds(
    addresses, entries, programs, factors, numbers, scratch, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Second moments from partial sums, in a fixed order; a unit is RUNS runs."""
    entry, unit = _work(entries, programs)
    exp_avg_sq = _address(addresses, entry, 3, tl.float32)
    u = unit * RUNS + tl.arange(0, RUNS)
    there = u < tl.load(entry + N_RUNS)
    outer, begin = _run(entry, u)
    index = outer * tl.load(entry + AXIS) + begin
    inner, between, length = tl.load(entry + INNER), tl.load(entry + BETWEEN), tl.load(entry + LENGTH)
    summed, stride = tl.load(entry + SUMMED), tl.load(entry + STRIDE)
    # Sums of spans are numbered by run, one for each piece of each row; those of columns by where they lie.
    by_run = summed == 0
    parts = tl.where(by_run, between, 1) * tl.load(entry + PIECES)
    own = tl.load(entry + SCRATCH) + tl.where(by_run, u, index * inner)
    sums = tl.zeros([RUNS, PARTS], dtype=tl.float32)
    for j in range(0, tl.maximum(summed, 1)):
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            mask = there[:, None] & (part < parts)[None, :]
            sums += tl.load(scratch + (own + j)[:, None] + (part * stride)[None, :], mask=mask, other=0.0)
    mean = tl.sum(sums, 1) / (between * length * inner).to(tl.float32)
    v = _second(tl.load(exp_avg_sq + index, mask=there, other=0.0), mean, numbers)
    _spread(exp_avg_sq, index, length, v, there, numbers, PARTS)
