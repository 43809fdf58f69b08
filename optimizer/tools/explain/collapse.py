"""One name for many: parameters that differ in the index of their layer alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

_Indices = tuple[frozenset[int], ...]


def collapse_names(names: Sequence[str], likeness: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """Group names that are equal but for whole components that are numbers.

    Args:
        names: dotted names, each once.
        likeness: what else must be equal for two names to be grouped.

    Returns:
        (name, positions in ``names``) of every group, in order of first appearance. Every combination of the indices
        in a name such as ``layers.{0..3,8}.experts.{0..7}.w1`` is in its group.
    """
    templates: dict[tuple[str, Hashable], dict[tuple[int, ...], int]] = {}
    for position, (name, like) in enumerate(zip(names, likeness, strict=True)):
        parts = name.split(".")
        template = ".".join("#" if _is_index(part) else part for part in parts)
        templates.setdefault((template, like), {})[tuple(int(p) for p in parts if _is_index(p))] = position
    out = []
    for (template, _), members in templates.items():
        for sets in _products(members):
            inside = [
                where for indices, where in members.items() if all(i in s for i, s in zip(indices, sets, strict=True))
            ]
            out.append((_written(template, sets), inside))
    return out


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _products(members: Iterable[tuple[int, ...]]) -> list[_Indices]:
    """Index tuples as few products of sets, merged one place at a time, the innermost first."""
    products: list[_Indices] = [tuple(frozenset((index,)) for index in indices) for indices in members]
    for place in reversed(range(len(products[0]))):
        merged: dict[tuple[_Indices, _Indices], set[int]] = {}
        for sets in products:
            merged.setdefault((sets[:place], sets[place + 1 :]), set()).update(sets[place])
        products = [(*before, frozenset(union), *after) for (before, after), union in merged.items()]
    return products


def _written(template: str, sets: _Indices) -> str:
    """The template with its indices: 3, {0..31}, or {0..2,5}."""
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
