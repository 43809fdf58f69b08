"""Merge the names of parameters that differ only in the index of their layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

_Indices = tuple[frozenset[int], ...]


def collapse_names(names: Sequence[str], likeness: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """Group names that differ only in components that are numbers.

    Args:
        names: dotted names without duplicates.
        likeness: a key for each name. Names are grouped only if their keys are equal.

    Returns:
        (name, positions in ``names``) of every group, in order of first appearance. A group whose name is, for example,
        ``layers.{0..3,8}.experts.{0..7}.w1`` contains every combination of these indices.
    """
    templates: dict[tuple[str, Hashable], dict[tuple[int, ...], int]] = {}
    for position, (name, like) in enumerate(zip(names, likeness, strict=True)):
        parts = name.split(".")
        template = ".".join("#" if _is_index(part) else part for part in parts)
        templates.setdefault((template, like), {})[tuple(int(p) for p in parts if _is_index(p))] = position
    out = []
    for (template, _), members in templates.items():
        for sets in _products(members):
            positions = [
                position
                for indices, position in members.items()
                if all(i in s for i, s in zip(indices, sets, strict=True))
            ]
            out.append((_format_name(template, sets), positions))
    return out


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _products(members: Iterable[tuple[int, ...]]) -> list[_Indices]:
    """Write index tuples as few Cartesian products of sets. Components are merged one by one, the innermost first."""
    products: list[_Indices] = [tuple(frozenset((index,)) for index in indices) for indices in members]
    for axis in reversed(range(len(products[0]))):
        merged: dict[tuple[_Indices, _Indices], set[int]] = {}
        for sets in products:
            merged.setdefault((sets[:axis], sets[axis + 1 :]), set()).update(sets[axis])
        products = [(*before, frozenset(union), *after) for (before, after), union in merged.items()]
    return products


def _format_name(template: str, sets: _Indices) -> str:
    """Fill the template with its sets of indices, which are written as 3, {0..31} or {0..2,5}."""
    remaining = iter(sets)
    return ".".join(_set_text(next(remaining)) if part == "#" else part for part in template.split("."))


def _set_text(indices: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
    return text if len(indices) == 1 else f"{{{text}}}"
