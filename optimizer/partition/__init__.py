"""Which elements of a parameter share a second-moment scalar: roles, rules and layouts."""

from .apply import layout_of, partition
from .discover import discover, tag
from .factored import FactoredLayout, TensorLayout
from .layout import Layout, Runs
from .roles import Anatomy, Part, Role, Unit
from .rules import Rules

__all__ = [
    "Anatomy",
    "FactoredLayout",
    "Layout",
    "Part",
    "Role",
    "Rules",
    "Runs",
    "TensorLayout",
    "Unit",
    "discover",
    "layout_of",
    "partition",
    "tag",
]
