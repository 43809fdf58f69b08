"""From what a tensor is (its anatomy) and what the rules say to how it falls into blocks (its layout)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .discover import discover
from .layout import Layout, Runs
from .overrides import refuse_headless
from .roles import HEAD_ROLES, Anatomy, Part, Role, Unit, viewed
from .rules import Rules

_COLUMNS = Unit.IN_NEURON


def partition(model: nn.Module, rules: str | Rules = "adam_mini") -> Mapping[str, Layout]:
    """The layout of every parameter of a model.

    Args:
        model: any module; frozen parameters are described too.
        rules: a shipped set's name, a path to a rules file, or ``Rules``.

    Returns:
        name as in ``model.named_parameters()`` -> Layout.

    Raises:
        ValueError, FileNotFoundError: as ``Rules.load`` and ``discover``; an override that matches no parameter or
            asks for heads where there are none.
    """
    loaded, anatomies = Rules.load(rules), discover(model)
    loaded.require_matches(anatomies)
    return {name: layout_of(anatomy, loaded, name) for name, anatomy in anatomies.items()}


def layout_of(anatomy: Anatomy, rules: Rules, name: str = "") -> Layout:
    """The layout of one tensor under the rules.

    Overrides of the rules apply where the parameter's ``name`` is given; one sets the unit of every part.

    A tensor whose parts all have the unit TENSOR is one block, fused or not. Input-neuron sharing needs an input
    axis and, in a fused tensor, that every part asks for it: runs lie along one axis. Where it is impossible the
    parts keep one scalar per output unit (finer, never coarser than asked), and the layout's note says so.

    Raises:
        ValueError: an override asks for attention heads of a tensor that has none.
    """
    override = rules.override_for(name)
    refuse_headless(override, name, ((part.role, part.head_dim) for part in anatomy.parts))
    units = [rules[part.role] if override is None else override.unit for part in anatomy.parts]
    if all(unit is Unit.TENSOR for unit in units):
        return _per_tensor(anatomy)
    if all(unit is Unit.ELEMENT for unit in units):
        return Layout.per_element(anatomy.shape)
    note = ""
    if any(unit is _COLUMNS for unit in units):
        if all(unit is _COLUMNS for unit in units) and anatomy.in_axis is not None:
            return _columns(anatomy, anatomy.in_axis)
        note = "no single input axis for all parts of this tensor: one scalar per output unit"
        units = [Unit.OUT_NEURON if unit is _COLUMNS else unit for unit in units]
    if len(anatomy.shape) > anatomy.leading + 1 and any(unit is Unit.ELEMENT for unit in units):
        return Layout.per_element(anatomy.shape)  # a part asks for Adam: the whole fused tensor gets it
    segments, notes = [], [note] if note else []
    for part, unit in zip(anatomy.parts, units, strict=True):
        segment, remark = _segment(part, unit)
        segments.append(segment)
        if remark:
            notes.append(remark)
    return _layout(anatomy, anatomy.axis, Runs(tuple(segments), anatomy.repeat), "; ".join(notes))


def _layout(anatomy: Anatomy, axis: int, runs: Runs, note: str = "") -> Layout:
    """Runs along one axis of the tensor as the anatomy views it."""
    leading = viewed(anatomy.shape, anatomy.fold)[: anatomy.leading]
    return Layout(axis, runs, leading, note, anatomy.fold)


def _segment(part: Part, unit: Unit) -> tuple[tuple[int, int], str]:
    """(run length, count) of one part, and a remark where the rules could not be followed to the letter."""
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
    """One block, or one per index of the leading axes (one per expert)."""
    if not anatomy.leading or anatomy.role is Role.CONV:
        return Layout.per_tensor(anatomy.shape)
    size = viewed(anatomy.shape, anatomy.fold)[anatomy.axis]
    return _layout(anatomy, anatomy.axis, Runs(((size, 1),) if size else ()))


def _columns(anatomy: Anatomy, in_axis: int) -> Layout:
    """One block per index of the input axis."""
    return _layout(anatomy, in_axis, Runs(((1, viewed(anatomy.shape, anatomy.fold)[in_axis]),)))


def has_heads(anatomy: Anatomy) -> bool:
    """Whether every part that belongs to attention heads knows its head_dim."""
    return all(part.head_dim is not None for part in anatomy.parts if part.role in HEAD_ROLES)


def understood(anatomy: Anatomy, rules: Rules, name: str = "") -> bool:
    """Whether the rules can be followed with what is known of a tensor, so that nobody needs to be warned.

    Vectors always can; a matrix needs a role and, where the rules ask for heads, a head_dim, or an override by name.
    """
    if len(anatomy.shape) < 2 or rules.override_for(name) is not None:
        return True
    if all(rules[role] is Unit.ELEMENT for role in Role):  # nothing is shared, so nothing has to be known
        return True
    wants_heads = any(rules[part.role] is Unit.ATTENTION_HEAD for part in anatomy.parts)
    return anatomy.recognised and (not wants_heads or has_heads(anatomy))
