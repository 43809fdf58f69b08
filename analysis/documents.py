"""Strict reading of JSON files: a file must contain one object, and no object may have a key twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def parse(text: str) -> Any:
    """Parse JSON in which no object has a key twice.

    Raises:
        ValueError: the text is not JSON, or an object has a key twice; Python's parser would keep only the last value.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs {keys.count(twice)} times")
    return document


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON file that contains one object.

    Args:
        path: the file.
        mend: how to repair a damaged file, for the message.

    Raises:
        ValueError: the file cannot be read, is not JSON, is not an object, or has a key twice.
    """
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(path, str(error), mend) from error
    if not isinstance(document, dict):
        raise damaged(path, f"it holds a JSON {type(document).__name__}, not an object", mend)
    return document


def damaged(path: Path, why: str, mend: str) -> ValueError:
    """Return an error that names a damaged file or folder, what is wrong with it, and the next action."""
    return ValueError(f"{path} is damaged ({why}); {mend}")


def is_finite(value: Any) -> bool:
    """Return whether a value from a JSON file is a finite number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
