"""What a rank's optimizer steps: tensors with the shapes of their first and second moments.

How tensors are cut is asked of ``optimizer.sharding.offline``, and which second moments a rank keeps then of the
geometries in ``optimizer.sharding``. Equal tensors (the layers of a model) are asked once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ...partition import Layout
from ...sharding.flat import FlatLayout, Range, within
from ...sharding.offline import ALIGNMENT, Mesh, chunk, joined, part, place, share, sub_groups
from ...step.moments import row_axes
from .sharding import Parameter, Setup, by_decay, require_divisible, tensor_parallel_axis, tensor_parallel_shape


class Weight(NamedTuple):
    """A parameter as it is cut.

    Attributes:
        shape: of the whole tensor.
        axis: what tensor parallelism cuts; None where it does not.
        layout: of the whole tensor.
    """

    shape: tuple[int, ...]
    axis: int | None
    layout: Layout


class Piece(NamedTuple):
    """Elements of one parameter on one rank, as far as the temporaries of a step depend on them.

    Attributes:
        numel: elements.
        rows: indices of the first axis of the tensor that they are elements of.
        second: second moments kept for them.
        quantised: elements that are quantised together where a row spans several axes; 0 for sharded tensors.
    """

    numel: int
    rows: int
    second: int
    quantised: int = 0


class Cut(NamedTuple):
    """A tensor's share on a rank of a mesh.

    Attributes:
        shape: of the local tensor.
        second: shape of the local second moment.
        boxes: (shape, layout) of the tensors that the local one consists of, in the order of their elements.
    """

    shape: tuple[int, ...]
    second: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], Layout], ...]


@lru_cache(maxsize=4096)
def cut(weight: Weight, dp: int, tp: int) -> Cut:
    """A tensor's share on the first rank of a (dp, tp) mesh; that rank holds the largest shares.

    Args:
        weight: the tensor.
        dp: ranks that cut axis 0.
        tp: ranks that cut ``weight.axis`` before that.
    """
    shape, axis, layout = weight
    if dp == tp == 1 or not shape:  # FSDP2 takes no scalars
        return Cut(shape, layout.aligned_shape(shape), ((shape, layout),))
    from ...sharding.placed import placed_geometry  # with it comes torch.distributed.tensor, which takes seconds

    geometry = placed_geometry(place(shape, axis, Mesh((dp, tp), (0, 0))), layout)  # type: ignore[arg-type]
    boxes = tuple(((*(box.shape or geometry.shape[:1]), *geometry.shape[1:]), box.layout) for box in geometry.boxes)
    return Cut(geometry.shape, geometry.aligned, boxes)


@dataclass(frozen=True)
class Placed:
    """A parameter's own tensor, whole or cut by a mesh.

    Attributes:
        weight: the parameter.
        dp, tp: ranks that cut it.
    """

    weight: Weight
    dp: int = 1
    tp: int = 1

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape that decides whether a first moment is quantised."""
        return self.weight.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first moment."""
        return cut(self.weight, self.dp, self.tp).shape

    @property
    def second(self) -> tuple[int, ...]:
        """Shape of the second moment."""
        return cut(self.weight, self.dp, self.tp).second

    def pieces(self) -> list[Piece]:
        """What is stepped at a time."""
        axes = row_axes(self.shape)
        row = prod(self.shape[-axes:]) if axes > 1 else 0
        return [Piece(prod(self.shape), self.shape[0] if self.shape else 1, prod(self.second), row)]


@dataclass(frozen=True)
class Section:
    """Elements [start, stop) of a flattened parameter, after tensor parallelism."""

    weight: Weight
    tp: int
    start: int
    stop: int

    def piece(self) -> Piece:
        """Its elements, and the second moments that a rank keeps for them."""
        return _piece(self)


@lru_cache(maxsize=65536)
def _piece(section: Section) -> Piece:
    whole, at, second = cut(section.weight, 1, section.tp), 0, 0
    for shape, layout in whole.boxes:
        bounds = within(at, at + prod(shape), section.start, section.stop)
        second += prod(FlatLayout((Range(shape, layout, (bounds,), 0),), prod(shape), "").aligned_shape(()))
        at += prod(shape)
    return Piece(section.stop - section.start, whole.shape[0] if whole.shape else 1, second)


@dataclass(frozen=True)
class Flat:
    """A one-dimensional tensor that holds sections of several parameters.

    Attributes:
        numel: elements, padding included.
        sections: what it holds, and how many equal ones.
    """

    numel: int
    sections: tuple[tuple[Section, int], ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape that decides whether a first moment is quantised."""
        return (self.numel,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first moment."""
        return (self.numel,)

    @property
    def second(self) -> tuple[int, ...]:
        """Shape of the second moment."""
        return (sum(count * section.piece().second for section, count in self.sections),)

    def pieces(self) -> list[Piece]:
        """What is stepped at a time."""
        return [section.piece() for section, _ in self.sections]


Tensor = Placed | Flat
Holding = Counter[Tensor]
"""What one rank's optimizer steps: tensors, and how many equal ones."""


def stepped(parameters: Sequence[Parameter], layouts: Sequence[Layout], setup: Setup) -> Iterator[Holding]:
    """What the optimizers of the ranks step, rank by rank.

    Args:
        parameters: those that train, in the model's order.
        layouts: of each.
        setup: how they are cut.

    Yields:
        One entry for every rank of a replica group under ZeRO; else one for the rank that holds the most.
    """
    weights = [_weight(p, layout, setup) for p, layout in zip(parameters, layouts, strict=True)]
    ranks = setup.data_parallel
    if not setup.flat or ranks == 1:
        dp = ranks if setup.sharding == "fsdp" else 1
        yield Counter(Placed(weight, dp, setup.tp) for weight in weights)
        return
    deal = _dealt if setup.zero == 3 else _joined
    groups = [deal([weights[i] for i in indices], setup.tp, ranks) for indices in by_decay(parameters)]
    for flats in zip(*groups, strict=True):
        yield Counter(flat for own in flats for flat in own)


def _weight(parameter: Parameter, layout: Layout, setup: Setup) -> Weight:
    require_divisible(parameter, setup.tp)
    axis = tensor_parallel_axis(parameter.anatomy) if setup.tp > 1 else None
    return Weight(parameter.anatomy.shape, axis, layout)


def _numel(weight: Weight, tp: int) -> int:
    """Elements after tensor parallelism."""
    return prod(cut(weight, 1, tp).shape)


def _dealt(weights: Sequence[Weight], tp: int, ranks: int) -> Iterator[list[Flat]]:
    """Each parameter flattened and dealt out by itself, one tensor per sub-group (ZeRO-3)."""
    numels = [_numel(weight, tp) for weight in weights]
    groups = [(sum(share(numels[i], ranks) for i in indices), Counter(weights[i] for i in indices))
              for indices in sub_groups(numels, ranks)]  # fmt: skip
    for rank in range(ranks):
        yield [Flat(numel, tuple((Section(weight, tp, *part(_numel(weight, tp), ranks, rank)), count)
                                 for weight, count in kinds.items())) for numel, kinds in groups]  # fmt: skip


def _joined(weights: Sequence[Weight], tp: int, ranks: int) -> Iterator[list[Flat]]:
    """All parameters of a group in one buffer, of which a rank has one part (ZeRO-1, ZeRO-2)."""
    numels = [_numel(weight, tp) for weight in weights]
    buffer = joined(numels, ranks, multiple=ALIGNMENT)
    held: list[Counter[Section]] = [Counter() for _ in range(ranks)]
    for i, weight in enumerate(weights):
        for rank, (start, stop) in buffer.parts(i, numels[i]).items():
            held[rank][Section(weight, tp, start, stop)] += 1
    for sections in held:
        yield [Flat(buffer.size, tuple(sections.items()))]


def elements(parameters: Sequence[Parameter], setup: Setup, *, sharded: bool) -> int:
    """Elements of all parameters, or of their gradients, on a rank; where ranks differ, on the one with the most.

    Args:
        parameters: that have such a tensor.
        setup: how they are cut.
        sharded: whether data parallelism cuts these tensors.
    """
    shapes = [tensor_parallel_shape(p, setup.tp) for p in parameters]
    ranks, numels = setup.data_parallel, [prod(shape) for shape in shapes]
    if not sharded or ranks == 1:
        return sum(numels)
    if not setup.flat:
        kinds = Counter(shapes).items()
        return sum(count * (prod(chunk(shape, 0, ranks, 0)) if shape else 1) for shape, count in kinds)
    if setup.zero == 3:
        return sum(share(numel, ranks) for numel in numels)
    groups = ([numels[i] for i in indices] for indices in by_decay(parameters))
    return sum(joined(group, ranks, multiple=ALIGNMENT).size for group in groups)
