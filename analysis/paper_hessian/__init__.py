"""Statistics of the study in docs/paper_hessian.md, from its stored results."""

from .store import PARTS, Results, load

__all__ = ["PARTS", "Results", "load"]
