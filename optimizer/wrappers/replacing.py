"""Temporary replacement of dictionary entries, with which a wrapper restores a model's original parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

MISSING = object()
"""A value that removes the entry."""


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[dict[str, Any], str, Any], None]]:
    """Open a context that yields a function ``put(dictionary, key, value)``.

    The entries that ``put`` sets are restored when the context closes.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []

    def put(dictionary: dict[str, Any], key: str, value: Any) -> None:
        changed.append((dictionary, key, dictionary.get(key, MISSING)))
        _set(dictionary, key, value)

    try:
        yield put
    finally:
        for dictionary, key, original in reversed(changed):
            _set(dictionary, key, original)


def _set(dictionary: dict[str, Any], key: str, value: Any) -> None:
    """Set an entry, or remove it if the value is ``MISSING``."""
    if value is MISSING:
        dictionary.pop(key, None)
    else:
        dictionary[key] = value
