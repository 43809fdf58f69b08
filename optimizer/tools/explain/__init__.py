"""What every parameter of a model is taken for, which blocks it has under a rule set, and why."""

from .rows import compare, explain, explanation

__all__ = ["compare", "explain", "explanation"]
