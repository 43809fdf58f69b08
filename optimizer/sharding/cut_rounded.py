"""The part of ``cut_update`` that rounds: quantised first moments, and bf16 parameters with ``bf16_rounding``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..step import moments
from ..step.dtypes import second_moment_dtype
from ..step.factored import roots
from ..step.places import Place
from ..step.rounding import apply
from .columns import Columns, Piece
from .flat import Range, box_shapes
from .flat_moments import FlatMoment, range_of
from .geometry import Box, Geometry
from .placed_moments import moved

_CHUNK = 1 << 16  # elements whose factors are computed at once


@dataclass(frozen=True)
class Rounds:
    """How the first moment and the parameter of a shard are rounded.

    Attributes:
        seed: seed of the whole tensor's random numbers, uint32.
        how: rounding of a bf16 parameter: None (to nearest), "stochastic" or "kahan".
        place: where the shard lies in the whole tensor; None for a flat tensor.
        flat: the first moment of a flat tensor; None for a DTensor.
        seeds: the seed of the whole tensor of each of its ranges.
    """

    seed: int
    how: str | None
    place: Place | None = None
    flat: FlatMoment | None = None
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class ColumnMeans:
    """The column means of the factored tensors that a step moves.

    Attributes:
        columns: the tensors.
        state: ``exp_avg_sq_col`` after the update.
        joined: its means over all columns, as ``columns.mean`` joins them.
    """

    columns: Columns
    state: Tensor
    joined: Tensor

    def pieces(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Yield each piece of the tensors, its column means, and the mean over all columns."""
        for matrices, mean in zip(self.columns.matrices, self.columns.means(self.joined), strict=True):
            view = matrices.of(self.state)
            for piece in matrices.pieces:
                yield piece, piece.columns(view), piece.columns(mean)


class Factors:
    """The factors of the first moment: lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).

    Args:
        geometry: the shard.
        sizes: the factors of blocks, shape ``geometry.aligned``; not used for factored boxes.
        second: ``exp_avg_sq`` after the update, which has the row means of factored boxes.
        columns: the column means after the update; None if nothing is factored.
        step_size: returns factors from square roots of second moments, which it may change.
    """

    def __init__(
        self,
        geometry: Geometry,
        sizes: Tensor,
        second: Tensor,
        columns: ColumnMeans | None,
        step_size: Callable[[Tensor], Tensor],
    ) -> None:
        self._geometry, self._sizes, self._second, self._step_size = geometry, sizes, second, step_size
        self._starts = [box.start or 0 for box in geometry.boxes]
        self._pieces: dict[int, list[tuple[Piece, Tensor, Tensor]]] = {}
        for piece, of_columns, mean in () if columns is None else columns.pieces():
            self._pieces.setdefault(piece.box, []).append((piece, of_columns, mean))

    def of(self, k: int, view: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, factor) for consecutive slices of axis 0 of a box; factors broadcast.

        Args:
            k: index of the box.
            view: the box's unfolded view of the parameter.
        """
        box = self._geometry.boxes[k]
        if not box.factored:
            yield 0, len(view), self._unfolded(box, self._sizes)
            return
        rows = max(1, _CHUNK * len(view) // max(1, view.numel()))
        for start in range(0, len(view), rows):
            size = (min(rows, len(view) - start), *view.shape[1:])
            yield start, start + size[0], self.part(k, (start, *(0 for _ in size[1:])), size)

    def elements(self, start: int, stop: int) -> Tensor:
        """Return the factors of the elements [start, stop) of a flat tensor, 1-D."""
        out, boxes = self._second.new_zeros(stop - start), self._geometry.boxes
        for k in range(max(0, bisect_right(self._starts, start) - 1), len(boxes)):
            box = boxes[k]
            assert box.start is not None and box.stop is not None
            low, high = max(start, box.start), min(stop, box.stop)
            if box.start >= stop:
                break
            at, dims = low - start, box.shape or (box.stop - box.start,)
            for first, size in box_shapes(low - box.start, high - box.start, dims):
                count = prod(size)
                out[at : at + count].view(size).copy_(self.part(k, first, size))
                at += count
        return out

    def part(self, k: int, first: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the factor of every element of a part of a box.

        Args:
            k: index of the box.
            first: index of the part's first element in the box's unfolded view.
            size: shape of the part.
        """
        box = self._geometry.boxes[k]
        spans = [(start, start + n) for start, n in zip(first, size, strict=True)]
        if not box.factored:
            return _within(self._unfolded(box, self._sizes), spans).expand(tuple(size))
        out = self._second.new_empty(tuple(size))
        rows = self._unfolded(box, self._second)
        for piece, columns, mean in self._pieces[k]:
            low, high = max(piece.start, spans[piece.dim][0]), min(piece.start + piece.length, spans[piece.dim][1])
            if low >= high:
                continue
            own = [(low, high) if dim == piece.dim else span for dim, span in enumerate(spans)]
            both = roots(*(_within(t, own) for t in (rows, columns, mean)))
            target = out.narrow(piece.dim, low - spans[piece.dim][0], high - low)
            target.copy_(self._step_size(both[0] * both[1]))
        return out

    def _unfolded(self, box: Box, values: Tensor) -> Tensor:
        shape = tuple(self._geometry.shape) if box.start is None else _shape(box, self._geometry.shape)
        (view,) = box.layout.unfold(box.of_second(values, shape))
        return view


def _shape(box: Box, local: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a box that is a slice of the local tensor's first axis."""
    assert box.start is not None and box.stop is not None
    return (*(box.shape or (box.stop - box.start,)), *local[1:])


def _within(values: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return the values of a part of a tensor, whose axes of size 1 broadcast."""
    for dim, (start, stop) in enumerate(spans):
        if values.dim() == len(spans) and values.shape[dim] > 1:
            values = values.narrow(dim, start, stop - start)
    return values


def move_ranges(
    geometry: Geometry,
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Any],
    factors: Factors,
    rounds: Rounds,
    *,
    step: int,
    beta1: float,
    decay: float | Tensor,
    maximize: bool,
) -> None:
    """Update the first moment and the elements of a flat tensor, in place; arguments as in ``move_boxes``."""
    flat, c = rounds.flat, state.get("compensation")
    assert flat is not None
    dtype = second_moment_dtype(param)
    for k, start, stop in _spans(geometry, flat.ranges, every=grad is None):
        stored, seed = flat.stored[k], rounds.seeds[k]
        for piece in flat.pieces(stored, start, stop):
            at = flat.local(stored, piece)
            g = torch.zeros_like(param[at], dtype=dtype) if grad is None else grad[at].to(dtype)
            if stored.n:
                codes, scale = flat.views(stored, piece, state["exp_avg"], state["exp_avg_scale"])
                g = piece.padded(g)
                m = moments.advance(
                    g, codes, scale, beta1=beta1, maximize=maximize, step=step, seed=seed, first=piece.block
                )
                m = piece.own(m)
            else:
                first = piece.element - stored.source.start
                old = flat.moment(stored, state["exp_avg"])[first : first + piece.numel]
                old.copy_(old.to(dtype) * beta1 + g * ((beta1 - 1) if maximize else (1 - beta1)))
                m = old.to(dtype)
            apply(
                param[at],
                m * factors.elements(at.start, at.stop),
                decay=decay if stored.source.decays else 0,
                how=rounds.how,
                compensation=None if c is None else c[at],
                step=step,
                seed=seed,
                first=piece.element,
            )


def _spans(geometry: Geometry, ranges: Sequence[Range], *, every: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (range, start, stop) of the elements of flattened tensors that no engine steps, as long as possible.

    Args:
        geometry: the shard of the flat tensor.
        ranges: its ranges.
        every: whether engines step nothing.
    """
    last: tuple[int, int, int] | None = None
    for box in geometry.boxes:
        if box.free and not every:
            continue
        assert box.start is not None and box.stop is not None
        k = range_of(ranges, box)
        shift = ranges[k].start - ranges[k].offset
        span = (k, box.start + shift, box.stop + shift)
        if last is not None and last[0] == k and last[2] == span[1]:
            last = (k, last[1], span[2])
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def move_boxes(
    geometry: Geometry,
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Any],
    factors: Factors,
    rounds: Rounds,
    *,
    step: int,
    beta1: float,
    decay: float | Tensor,
    maximize: bool,
) -> None:
    """Update the first moment and the elements of a DTensor's shard, in place.

    Args:
        geometry: the shard.
        param: the local parameter; changed.
        grad: the local gradient; None counts as zeros, and then free boxes are stepped, too.
        state: the local state; ``exp_avg``, ``exp_avg_scale`` and ``compensation`` are changed.
        factors: the factors of the first moment.
        rounds: how values are rounded.
        step: number of steps taken, this one included.
        beta1: decay rate of the first moment, in [0, 1).
        decay: lr * weight_decay.
        maximize: ascend instead of descend.
    """
    assert rounds.place is not None
    names = ("exp_avg", "exp_avg_scale", "compensation")
    for k, box in enumerate(geometry.boxes):
        if box.free and grad is not None:
            continue
        view = box.of(param)
        g = torch.zeros_like(view) if grad is None else box.of(grad)
        tensors: list[Any] = [view, g, *(None if state.get(name) is None else box.of(state[name]) for name in names)]
        tensors = box.layout.unfold(*tensors)
        place = moved(rounds.place, geometry.shape, box.start or 0)
        for start, stop, factor in factors.of(k, tensors[0]):
            whole = stop - start == len(tensors[0])
            p, own, m, scale, c = (t if t is None or whole else t[start:stop] for t in tensors)
            moments.move(
                p,
                own,
                m,
                scale,
                factor,
                beta1=beta1,
                decay=decay if box.decays else 0,
                maximize=maximize,
                step=step,
                seed=rounds.seed,
                how=rounds.how,
                compensation=c,
                first_row=start,
                place=place,
            )
