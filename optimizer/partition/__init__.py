"""Which parameters may share a second-moment scalar: roles, layouts, rules."""

from .apply import layout_of
from .discover import discover, tag
from .explain import compare, explain, explanation, partition
from .layout import Layout, Runs
from .roles import Anatomy, Part, Role, Unit
from .rules import Rules

__all__ = [
    "Anatomy", "Layout", "Part", "Role", "Rules", "Runs", "Unit",
    "compare", "discover", "explain", "explanation", "layout_of", "partition", "tag",
]  # fmt: skip
