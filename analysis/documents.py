"""JSON files that are read as evidence: there, whole, one object, and no key twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def parse(text: str) -> Any:
    """JSON in which no object names a key twice.

    Raises:
        ValueError: it is not JSON, or a key stands twice in one object, of which all but the last would be lost.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there {keys.count(twice)} times")
    return document


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        mend: what to do about a damaged one, for the message.

    Raises:
        ValueError: the file cannot be read, is not JSON, holds no object, or names a key twice.
    """
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(path, str(error), mend) from error
    if not isinstance(document, dict):
        raise damaged(path, f"it holds a JSON {type(document).__name__}, not an object", mend)
    return document


def damaged(path: Path, why: str, mend: str) -> ValueError:
    """The error that names a damaged file or folder, what is wrong with it, and the next action."""
    return ValueError(f"{path} is damaged ({why}); {mend}")


def is_finite(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
