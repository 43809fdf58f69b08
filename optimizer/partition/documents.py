"""JSON parsing that refuses a key that occurs twice in one object, where ``json`` would use the last one."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Parse JSON in which no object has the same key twice.

    Raises:
        ValueError: the text is not JSON, or an object has a key twice; the message names the key.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its (key, value) pairs; raise ValueError for a repeated key."""
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is there {keys.count(repeated)} times: keep one")
    return document
