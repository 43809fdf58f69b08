"""The architectures that come with the package: published configurations, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).with_name("configs")


def shipped() -> list[str]:
    """Return the names of the architectures that come with the package, the smallest first."""
    return sorted((path.stem for path in _CONFIGS.glob("*.json")), key=lambda name: facts(name)["order"])


def facts(name: str) -> dict[str, Any]:
    """Return the document of an architecture: its title, source, order, config and reported memory.

    Its entry ``small`` contains the sizes of a model of the same architecture that is small enough to have weights.

    Raises:
        ValueError: no architecture of this name comes with the package.
    """
    path = _CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"target {name!r} is not one of the shipped architectures {shipped()}")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
