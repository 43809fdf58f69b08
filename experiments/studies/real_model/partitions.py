"""The partitions that the study compares: by element, row, column, head, tensor, layer and at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from experiments.studies.real_model.subject import layer_of
from hessian.single_probes import Signs
from hessian.symmetry import random_signs
from optimizer import Role, Rules, Unit, partition
from optimizer.partition import Layout, TensorLayout

TABLES = (Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.HEAD)
VECTORS = (Role.NORM, Role.BIAS)
ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE)


def _rules(name: str, matrices: Unit, tables: Unit, attention: Unit) -> Rules:
    units = dict.fromkeys(Role, matrices) | dict.fromkeys(TABLES, tables) | dict.fromkeys(VECTORS, Unit.TENSOR)
    return Rules(name, units | dict.fromkeys(ATTENTION, attention))


UNITS = {
    "row": _rules("row", Unit.OUT_NEURON, Unit.TOKEN, Unit.OUT_NEURON),
    "column": _rules("column", Unit.IN_NEURON, Unit.IN_NEURON, Unit.IN_NEURON),
    "head": _rules("head", Unit.TENSOR, Unit.TENSOR, Unit.ATTENTION_HEAD),
    "tensor": _rules("tensor", Unit.TENSOR, Unit.TENSOR, Unit.TENSOR),
}
"""Partitions inside tensors. A norm weight is always one block, and so is a matrix without heads under ``head``."""


@dataclass(frozen=True)
class Partition:
    """A partition of some parameters.

    Attributes:
        signs: see ``hessian.single_probes.Signs``.
        squares: sum of the squared sizes of the blocks that begin in each parameter, [parameters].
    """

    signs: Signs
    squares: list[int]


def partitions(model: nn.Module, names: Sequence[str], *, control: int | None = None) -> dict[str, Partition]:
    """Return the partitions of some parameters of a model, in the order of ``names``.

    Args:
        model: the model.
        names: names of parameters.
        control: seed of ``random``, random blocks of the sizes of ``row``; None for no such partition.
    """
    shapes = [tuple(dict(model.named_parameters())[name].shape) for name in names]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    out = {"element": Partition(lambda generator: random_signs(sum(sizes), generator), sizes)}
    for unit, rules in UNITS.items():
        of_model = partition(model, rules)
        layouts = [_blocks(of_model[name], name) for name in names]
        out[unit] = Partition(_drawn(layouts, shapes), [_squares(x, s) for x, s in zip(layouts, shapes, strict=True)])
    layers = [layer_of(name) for name in names]
    if len(set(layers)) > 1:
        present = list(dict.fromkeys(layers))
        totals = {layer: sum(n for n, x in zip(sizes, layers, strict=True) if x == layer) for layer in present}
        first = [layers.index(layer) == i for i, layer in enumerate(layers)]
        squares = [totals[layer] ** 2 if begins else 0 for layer, begins in zip(layers, first, strict=True)]
        out["layer"] = Partition(_by_group([present.index(layer) for layer in layers], sizes), squares)
    if control is not None:
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(control))
        rows = out["row"]
        out["random"] = Partition(lambda generator: rows.signs(generator)[order], rows.squares)
    return out


def _blocks(layout: TensorLayout, name: str) -> Layout:
    if not isinstance(layout, Layout) or layout.fold > 1 or layout.note:
        raise ValueError(
            f"{name} cannot have the blocks that were asked for ({layout.note}); leave it out of the study"
        )
    return layout


def _aligned(layout: Layout, table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Spread one value per block over a tensor: [blocks] -> [elements]."""
    per_index = table.reshape(-1, len(layout.runs)).repeat_interleave(layout.runs.lengths(), dim=1)
    return per_index.reshape(layout.aligned_shape(shape)).expand(shape).reshape(-1)


def _drawn(layouts: Sequence[Layout], shapes: Sequence[tuple[int, ...]]) -> Signs:
    def draw(generator: Generator) -> Tensor:
        pairs = zip(layouts, shapes, strict=True)
        return torch.cat([_aligned(x, random_signs(x.n_blocks, generator), s) for x, s in pairs])

    return draw


def _by_group(groups: Sequence[int], sizes: Sequence[int]) -> Signs:
    index, counts = torch.tensor(groups), torch.tensor(sizes)

    def draw(generator: Generator) -> Tensor:
        return random_signs(int(index.max()) + 1, generator)[index].repeat_interleave(counts)

    return draw


def _squares(layout: Layout, shape: tuple[int, ...]) -> int:
    """Return the sum of squared block sizes of a tensor."""
    copies = layout.n_blocks // len(layout.runs)
    return copies * int((layout.runs.lengths() * layout.numel_per_index(shape)).square().sum())
