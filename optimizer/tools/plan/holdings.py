"""Compute the tensors that each rank's optimizer steps, with the shapes of their first and second moments.

``optimizer.sharding.offline`` computes how tensors are sharded, and the geometries of ``optimizer.sharding`` compute
which second moments a rank stores then. Results are computed once for equal tensors, such as those of a model's layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from ...partition import FactoredLayout, TensorLayout
from ...sharding.flat import FlatLayout, Range, within
from ...sharding.flat_moments import FlatMoment, aligned
from ...sharding.offline import ALIGNMENT, Mesh, chunk, joined, part, place, share, sub_groups
from ...step.moments import Format, quantises, row_axes, state_shapes
from .sharding import Parameter, Setup, by_decay, require_divisible, tensor_parallel_axis, tensor_parallel_shape


class Weight(NamedTuple):
    """A parameter, and how tensor parallelism shards it.

    Attributes:
        shape: shape of the whole tensor.
        axis: axis that tensor parallelism shards; None if it replicates the tensor.
        layout: layout of the whole tensor.
    """

    shape: tuple[int, ...]
    axis: int | None
    layout: TensorLayout


class Portion(NamedTuple):
    """Elements of one parameter that a rank steps at once, described by what determines the temporaries of the step.

    Attributes:
        numel: number of elements.
        rows: size of the first axis of the tensor that contains them.
        second: number of second-moment values stored for them.
        quantised: number of elements of a row that is quantised at once: one that spans several axes, or a row of a
            flattened tensor; 0 if there is no such row.
        apart: whether neighbours in memory belong to different blocks, as if the blocks are columns.
    """

    numel: int
    rows: int
    second: int
    quantised: int = 0
    apart: bool = False


class Cut(NamedTuple):
    """The shard of a tensor on a rank of a mesh.

    Attributes:
        shape: shape of the local tensor.
        second: shape of the local second moment; the number of row and column means if it is factored.
        boxes: (shape, layout) of each box that the local tensor consists of, in the order of their elements.
    """

    shape: tuple[int, ...]
    second: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], TensorLayout], ...]


@lru_cache(maxsize=4096)
def cut(weight: Weight, dp: int, tp: int) -> Cut:
    """Return the shard of a tensor on the first rank of a (dp, tp) mesh, which is the largest shard.

    Args:
        weight: the tensor.
        dp: number of ranks that shard axis 0 after tensor parallelism.
        tp: number of ranks that shard ``weight.axis``.
    """
    shape, axis, layout = weight
    if dp == tp == 1 or not shape:  # FSDP2 does not shard scalars.
        columns = layout.columns_shape(shape)
        second = layout.aligned_shape(shape)
        if columns is not None:
            second = (prod(second) + prod(columns),)
        return Cut(shape, second, ((shape, layout),))
    # Imported here, because it imports torch.distributed.tensor, which takes seconds.
    from ...sharding.placed import placed_geometry
    from ...sharding.placed_columns import placed_factored_geometry

    placed = place(shape, axis, Mesh((dp, tp), (0, 0)))
    if isinstance(layout, FactoredLayout):
        factored = placed_factored_geometry(placed, layout)  # type: ignore[arg-type]
        state = factored.columns
        assert state is not None
        second = (prod(factored.aligned) + prod(state.shape),)
        return Cut(factored.shape, second, ((factored.shape, state.local or layout),))
    geometry = placed_geometry(placed, layout)  # type: ignore[arg-type]
    boxes = tuple(((*(box.shape or geometry.shape[:1]), *geometry.shape[1:]), box.layout) for box in geometry.boxes)
    return Cut(geometry.shape, geometry.aligned, boxes)


@dataclass(frozen=True)
class Placed:
    """A parameter that is stepped as its own tensor, whole or sharded by a mesh.

    Attributes:
        weight: the parameter.
        dp: number of data-parallel ranks that shard it.
        tp: number of tensor-parallel ranks that shard it.
    """

    weight: Weight
    dp: int = 1
    tp: int = 1

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape that determines whether the first moment is quantised."""
        return self.weight.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first moment."""
        return cut(self.weight, self.dp, self.tp).shape

    @property
    def second(self) -> tuple[int, ...]:
        """Shape of the second moment."""
        return cut(self.weight, self.dp, self.tp).second

    def quantised(self, format: Format, itemsize: int) -> tuple[int, int] | None:
        """Return the bytes of codes and of scales, or None if the first moment is too small to quantise.

        Args:
            format: the format of the first moment.
            itemsize: bytes of an element that is not quantised.
        """
        if not quantises(self.whole):
            return None
        codes, scales = state_shapes(self.shape, format, row_axes(self.whole))
        return prod(codes), prod(scales) * format.scale_dtype.itemsize

    def portions(self) -> list[Portion]:
        """Return the elements that are stepped at once: the whole local tensor."""
        axes = row_axes(self.whole)
        row = prod(self.shape[-axes:]) if axes > 1 else 0
        apart = len(self.shape) > 1 and self.second[-1:] != (1,)
        return [Portion(prod(self.shape), self.shape[0] if self.shape else 1, prod(self.second), row, apart)]


@dataclass(frozen=True)
class Section:
    """Elements [start, stop) of a flattened parameter, after tensor parallelism over ``tp`` ranks."""

    weight: Weight
    tp: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter after tensor parallelism."""
        return cut(self.weight, 1, self.tp).shape

    def quantised(self, format: Format, itemsize: int) -> tuple[int, int]:
        """Return the bytes of codes, or of a moment that is too small to quantise, and of scales; see ``Placed``."""
        if not quantises(self.shape):
            return aligned((self.stop - self.start) * itemsize), 0
        source = Range(self.shape, self.weight.layout, ((self.start, self.stop),), 0)
        flat = FlatMoment((source,), self.stop - self.start, format, torch.float32)
        return aligned(flat.shapes[0][0]), flat.shapes[1][0] * format.scale_dtype.itemsize

    def portion(self) -> Portion:
        """Return the number of these elements, and of the second-moment values that a rank stores for them."""
        return _portion(self)


@lru_cache(maxsize=65536)
def _portion(section: Section) -> Portion:
    whole, box_start, second = cut(section.weight, 1, section.tp), 0, 0
    for shape, layout in whole.boxes:
        bounds = within(box_start, box_start + prod(shape), section.start, section.stop)
        flat = FlatLayout((Range(shape, layout, (bounds,), 0),), prod(shape), "")
        second += prod(flat.aligned_shape(())) + prod(flat.columns_shape(()) or (0,))
        box_start += prod(shape)
    row = prod(whole.shape[-row_axes(whole.shape) :]) if quantises(whole.shape) else 0
    return Portion(section.stop - section.start, whole.shape[0] if whole.shape else 1, second, row)


@dataclass(frozen=True)
class Flat:
    """A one-dimensional tensor that contains sections of several parameters.

    Attributes:
        numel: number of elements, including padding.
        sections: (section, number of equal sections) for each distinct section.
    """

    numel: int
    sections: tuple[tuple[Section, int], ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape that determines whether the first moment is quantised."""
        return (self.numel,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first moment."""
        return (self.numel,)

    @property
    def second(self) -> tuple[int, ...]:
        """Shape of the second moment."""
        return (sum(count * section.portion().second for section, count in self.sections),)

    def quantised(self, format: Format, itemsize: int) -> tuple[int, int] | None:
        """Return the bytes of codes and of scales, or None if no section is quantised; see ``Placed``."""
        if not any(quantises(section.shape) for section, _ in self.sections):
            return None
        sizes = [(count, *section.quantised(format, itemsize)) for section, count in self.sections]
        return sum(count * codes for count, codes, _ in sizes), sum(count * scales for count, _, scales in sizes)

    def portions(self) -> list[Portion]:
        """Return the elements that are stepped at once: each distinct section."""
        return [section.portion() for section, _ in self.sections]


Tensor = Placed | Flat
Holding = Counter[Tensor]
"""The tensors that one rank's optimizer steps, and the number of equal tensors."""


def stepped(parameters: Sequence[Parameter], layouts: Sequence[TensorLayout], setup: Setup) -> Iterator[Holding]:
    """Yield the tensors that the optimizer of each rank steps.

    Args:
        parameters: trainable parameters, in the model's order.
        layouts: layout of each parameter.
        setup: parallelism and dtypes of the training run.

    Yields:
        Under ZeRO, the tensors of every data-parallel rank. Otherwise only those of the rank with the most elements.
    """
    weights = [_weight(p, layout, setup) for p, layout in zip(parameters, layouts, strict=True)]
    ranks = setup.data_parallel
    if not setup.flat or ranks == 1:
        dp = ranks if setup.sharding == "fsdp" else 1
        yield Counter(Placed(weight, dp, setup.tp) for weight in weights)
        return
    shards = _zero3 if setup.zero == 3 else _zero12
    groups = [shards([weights[i] for i in indices], setup.tp, ranks) for indices in by_decay(parameters)]
    for flats in zip(*groups, strict=True):
        yield Counter(flat for group_flats in flats for flat in group_flats)


def _weight(parameter: Parameter, layout: TensorLayout, setup: Setup) -> Weight:
    require_divisible(parameter, setup.tp)
    axis = tensor_parallel_axis(parameter.anatomy) if setup.tp > 1 else None
    return Weight(parameter.anatomy.shape, axis, layout)


def _numel(weight: Weight, tp: int) -> int:
    """Return the number of elements of a shard after tensor parallelism."""
    return prod(cut(weight, 1, tp).shape)


def _zero3(weights: Sequence[Weight], tp: int, ranks: int) -> Iterator[list[Flat]]:
    """Yield the tensors of each rank under ZeRO-3, which shards every parameter separately.

    The shards of a sub-group of parameters are joined to one tensor.
    """
    numels = [_numel(weight, tp) for weight in weights]
    groups = [
        (sum(share(numels[i], ranks) for i in indices), Counter(weights[i] for i in indices))
        for indices in sub_groups(numels, ranks)
    ]
    for rank in range(ranks):
        yield [
            Flat(
                numel,
                tuple(
                    (Section(weight, tp, *part(_numel(weight, tp), ranks, rank)), count)
                    for weight, count in kinds.items()
                ),
            )
            for numel, kinds in groups
        ]


def _zero12(weights: Sequence[Weight], tp: int, ranks: int) -> Iterator[list[Flat]]:
    """Yield the tensor of each rank under ZeRO-1 and ZeRO-2, which shard one buffer of all parameters of a group."""
    numels = [_numel(weight, tp) for weight in weights]
    buffer = joined(numels, ranks, multiple=ALIGNMENT)
    rank_sections: list[Counter[Section]] = [Counter() for _ in range(ranks)]
    for i, weight in enumerate(weights):
        for rank, (start, stop) in buffer.parts(i, numels[i]).items():
            rank_sections[rank][Section(weight, tp, start, stop)] += 1
    for sections in rank_sections:
        yield [Flat(buffer.size, tuple(sections.items()))]


def elements(parameters: Sequence[Parameter], setup: Setup, *, sharded: bool) -> int:
    """Return the number of elements of all parameters, or of all gradients, on the rank with the most elements.

    Args:
        parameters: the parameters to count, or the parameters whose gradients to count.
        setup: parallelism and dtypes of the training run.
        sharded: whether data parallelism shards these tensors.
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
