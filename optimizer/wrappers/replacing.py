"""Entries of dictionaries replaced for a while: how a wrapper shows a model as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

MISSING = object()
"""Instead of a value: the entry is taken out."""


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[dict[str, Any], str, Any], None]]:
    """While this is open, entries set by what it gives stand; afterwards the dictionaries are as they were."""
    changed: list[tuple[dict[str, Any], str, Any]] = []

    def put(holder: dict[str, Any], name: str, value: Any) -> None:
        changed.append((holder, name, holder.get(name, MISSING)))
        _set(holder, name, value)

    try:
        yield put
    finally:
        for holder, name, before in reversed(changed):
            _set(holder, name, before)


def _set(holder: dict[str, Any], name: str, value: Any) -> None:
    if value is MISSING:
        holder.pop(name, None)
    else:
        holder[name] = value
