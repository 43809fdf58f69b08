"""Names of the parameters in a group, for messages and for matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def label(group: Mapping[str, Any], g: int, i: int) -> str:
    """Describe parameter ``i`` of group number ``g`` in words, for messages."""
    names = group.get("param_names") or []
    return f"parameter {i} of group {g} ({names[i] if i < len(names) else 'unnamed'})"


def named(group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
    """Return (parameter, name) pairs of a group; the name is empty where the group has no names."""
    names = group.get("param_names") or [""] * len(group["params"])
    return list(zip(group["params"], names, strict=True))
