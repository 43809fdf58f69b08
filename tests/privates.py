"""Private names that one file of a package takes from another: attributes of its classes, or names it imports."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path


def reached(files: Sequence[Path]) -> list[str]:
    """Every use of another file's private name, as "file:line expression".

    A private name belongs to the files that assign it on ``self`` or define it in a class. Names of other libraries
    (``torch``'s ``_local_tensor``, for instance) belong to none of the files and are not reported.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    owners: defaultdict[str, set[Path]] = defaultdict(set)
    for file, tree in trees.items():
        for name in _defined(tree):
            owners[name].add(file)
    return [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if _takes_import(node)
        or (
            isinstance(node, ast.Attribute) and node.attr in owners and file not in owners[node.attr] and not _own(node)
        )
    ]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    """Private names that a file's classes define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and _is_private(item.name):
                    yield item.name
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and _is_private(item.target.id)
                ):
                    yield item.target.id
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _own(node)
            and _is_private(node.attr)
        ):
            yield node.attr


def _own(node: ast.Attribute) -> bool:
    """Whether the attribute is one of ``self``, ``cls`` or ``super()``."""
    value = node.value
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _takes_import(node: ast.AST) -> bool:
    """Whether the node imports a private name from a file of the same package."""
    return isinstance(node, ast.ImportFrom) and node.level > 0 and any(_is_private(alias.name) for alias in node.names)
