"""Explain the role that every parameter of a model has, its blocks under a rule set, and the reasons."""

from .rows import compare, explain, explanation

__all__ = ["compare", "explain", "explanation"]
