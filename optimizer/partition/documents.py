"""JSON as people write it: a key that stands twice in one object is an error, not a matter of which came last."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """JSON in which no object names a key twice.

    Raises:
        ValueError: it is not JSON, or a key stands twice in one object: naming the key.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there {keys.count(twice)} times: keep one")
    return document
