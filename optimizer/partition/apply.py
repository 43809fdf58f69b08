"""Layouts: the blocks of a tensor, from what it does in the network (its anatomy) and from the rules."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import nn

from .discover import discover
from .factored import FactoredLayout, TensorLayout
from .layout import Layout, Runs
from .overrides import refuse_headless
from .roles import HEAD_ROLES, Anatomy, Part, Role, Unit, viewed
from .rules import Rules

_COLUMNS = Unit.IN_NEURON


def partition(model: nn.Module, rules: str | Rules = "adam_mini") -> Mapping[str, TensorLayout]:
    """Return the layout of every parameter of a model.

    Args:
        model: any module; frozen parameters are included.
        rules: the name of a shipped set, the path of a rules file, or a ``Rules`` object.

    Returns:
        Parameter name, as in ``model.named_parameters()``, -> Layout; FactoredLayout for the unit FACTORED.

    Raises:
        FileNotFoundError: ``rules`` is a path that does not exist.
        ValueError: the rules are invalid, ``discover`` refuses the model, or an override matches no parameter or asks
            for attention heads of a parameter that has none.
    """
    loaded, anatomies = Rules.load(rules), discover(model)
    loaded.require_matches(anatomies)
    return {name: layout_of(anatomy, loaded, name) for name, anatomy in anatomies.items()}


def layout_of(anatomy: Anatomy, rules: Rules, name: str = "") -> TensorLayout:
    """Return the layout of one tensor under the rules.

    A tensor whose parts all have the unit TENSOR is one block, even if it is fused. The unit IN_NEURON needs an input
    axis and, in a fused tensor, must be the unit of every part, because runs lie along one axis. If that is not so,
    these parts get one scalar per output unit, which is finer than the rules ask for, and the layout's note says so.

    If one part of a fused tensor has the unit FACTORED, all parts are factored, each with its own column means; the
    note names the units that this replaces. A vector, or a matrix with a single row or column, has the unit ELEMENT
    instead of FACTORED, which is the same.

    Args:
        anatomy: what the tensor does.
        rules: the unit of each role.
        name: the parameter's name. An override that matches it sets the unit of every part. Without a name, no
            override applies.

    Raises:
        ValueError: an override asks for attention heads of a tensor that has none.
    """
    layout = _layout_under(anatomy, rules, name)
    return layout.described(factored=factored_layout(anatomy)) if isinstance(layout, Layout) else layout


def _layout_under(anatomy: Anatomy, rules: Rules, name: str) -> TensorLayout:
    """Return the layout of one tensor under the rules, see ``layout_of``."""
    override = rules.override_for(name)
    refuse_headless(override, name, ((part.role, part.head_dim) for part in anatomy.parts))
    units = [rules[part.role] if override is None else override.unit for part in anatomy.parts]
    if all(unit is Unit.TENSOR for unit in units):
        return _per_tensor(anatomy)
    if all(unit is Unit.ELEMENT for unit in units):
        return Layout.per_element(anatomy.shape)
    if any(unit is Unit.FACTORED for unit in units):
        return _factored(anatomy, units)
    note = ""
    if any(unit is _COLUMNS for unit in units):
        if all(unit is _COLUMNS for unit in units) and anatomy.in_axis is not None:
            return _columns(anatomy, anatomy.in_axis)
        note = "no single input axis for all parts of this tensor: one scalar per output unit"
        units = [Unit.OUT_NEURON if unit is _COLUMNS else unit for unit in units]
    if len(anatomy.shape) > anatomy.leading + 1 and any(unit is Unit.ELEMENT for unit in units):
        # Runs cannot separate the elements of one part only.
        return Layout.per_element(anatomy.shape).described(
            _others(anatomy, units, Unit.ELEMENT, "one scalar per element")
        )
    segments, notes = [], [note] if note else []
    for part, unit in zip(anatomy.parts, units, strict=True):
        segment, segment_note = _segment(part, unit)
        segments.append(segment)
        if segment_note:
            notes.append(segment_note)
    return _layout(anatomy, anatomy.axis, Runs(tuple(segments), anatomy.repeat), "; ".join(notes))


def _layout(anatomy: Anatomy, axis: int, runs: Runs, note: str = "") -> Layout:
    """Return a layout whose runs lie along an axis of the tensor, counted after axis 0 is split into ``fold``."""
    leading = viewed(anatomy.shape, anatomy.fold)[: anatomy.leading]
    return Layout(axis, runs, leading, note, anatomy.fold)


def _segment(part: Part, unit: Unit) -> tuple[tuple[int, int], str]:
    """Return (run length, count) of one part, and a note if the rules could not be followed exactly."""
    if part.size == 0:
        return (1, 0), ""
    if unit is Unit.TENSOR:
        return (part.size, 1), ""
    if unit is Unit.ATTENTION_HEAD:
        if part.head_dim is None:
            return (1, part.size), f"{part.role.value}: head_dim unknown, one scalar per row"
        return (part.head_dim, part.size // part.head_dim), ""
    return (1, part.size), ""


def _per_tensor(anatomy: Anatomy) -> Layout:
    """Return a layout with one block, or one block per index of the leading axes (one per expert)."""
    if not anatomy.leading or anatomy.role is Role.CONV:
        return Layout.per_tensor(anatomy.shape)
    size = viewed(anatomy.shape, anatomy.fold)[anatomy.axis]
    return _layout(anatomy, anatomy.axis, Runs(((size, 1),) if size else ()))


def _columns(anatomy: Anatomy, in_axis: int) -> Layout:
    """Return a layout with one block per index of the input axis."""
    return _layout(anatomy, in_axis, Runs(((1, viewed(anatomy.shape, anatomy.fold)[in_axis]),)))


def _factored(anatomy: Anatomy, units: list[Unit]) -> TensorLayout:
    """Return a layout with row and column means for every part, or the elementwise layout where that is the same."""
    layout = factored_layout(anatomy)
    if layout is None:
        single = len(anatomy.shape) > 1 and prod(anatomy.shape) > 0
        note = "a single row or column: factored is one scalar per element" if single else ""
        return Layout.per_element(anatomy.shape).described(note)
    return layout.described(_others(anatomy, units, Unit.FACTORED, "factored"))


def _others(anatomy: Anatomy, units: list[Unit], given: Unit, words: str) -> str:
    """Return a note that names the parts which asked for another unit than the tensor gets; "" if none did."""
    others = dict.fromkeys(
        f"{part.role.value} asks for {unit.value}"
        for part, unit in zip(anatomy.parts, units, strict=True)
        if unit is not given and part.size
    )
    return f"{words} like its other parts: {', '.join(others)}" if others else ""


def factored_layout(anatomy: Anatomy) -> FactoredLayout | None:
    """Return the factored layout of a tensor, or None if it is a vector or has a single row or column."""
    view = viewed(anatomy.shape, anatomy.fold)
    matrix = view[anatomy.leading :]
    rows = view[anatomy.axis] if view else 1
    if len(matrix) < 2 or rows < 2 or prod(matrix) // rows < 2:
        return None
    segments = list(enumerate(part.size for part in anatomy.parts if part.size))
    return FactoredLayout(
        anatomy.shape, anatomy.axis, segments, repeat=anatomy.repeat, leading=anatomy.leading, fold=anatomy.fold
    )


def has_heads(anatomy: Anatomy) -> bool:
    """Whether ``head_dim`` is known for every part that belongs to attention heads."""
    return all(part.head_dim is not None for part in anatomy.parts if part.role in HEAD_ROLES)


def understood(anatomy: Anatomy, rules: Rules, name: str = "") -> bool:
    """Whether enough is known about a tensor to apply the rules, so that no warning is needed.

    This is always true for vectors and for parameters with an override. Other tensors need a role and, if the rules
    ask for attention heads, a ``head_dim``.
    """
    if len(anatomy.shape) < 2 or rules.override_for(name) is not None:
        return True
    if all(rules[role] is Unit.ELEMENT for role in Role):  # elements share nothing, so roles do not matter
        return True
    wants_heads = any(rules[part.role] is Unit.ATTENTION_HEAD for part in anatomy.parts)
    return anatomy.recognised and (not wants_heads or has_heads(anatomy))
