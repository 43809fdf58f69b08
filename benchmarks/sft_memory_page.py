"""The page of ``benchmarks.sft_memory``."""

from __future__ import annotations

from typing import Any


def page(document: dict[str, Any]) -> str:
    return ""
