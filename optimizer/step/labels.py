"""Names and places of the parameters in a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def label(group: Mapping[str, Any], g: int, i: int) -> str:
    """A parameter in words, for messages."""
    names = group.get("param_names") or []
    return f"parameter {i} of group {g} ({names[i] if i < len(names) else 'unnamed'})"


def named(group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
    """(parameter, name or an empty one) of a group."""
    names = group.get("param_names") or [""] * len(group["params"])
    return list(zip(group["params"], names, strict=True))
