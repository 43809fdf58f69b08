"""The architectures that come with the package: published configurations, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).with_name("configs")


def shipped() -> list[str]:
    """Names of the architectures that come with the package, small ones first."""
    return sorted((path.stem for path in _CONFIGS.glob("*.json")), key=lambda name: facts(name)["order"])


def facts(name: str) -> dict[str, Any]:
    """The document of an architecture: title, source, order, config, reported memory.

    ``small`` holds the sizes of a model of the same make that is small enough to have weights.

    Raises:
        ValueError: no such architecture.
    """
    path = _CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"target {name!r} is not one of the shipped architectures {shipped()}")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
