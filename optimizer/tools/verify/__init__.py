"""Check a partition against gradients of the model."""

from .report import Finding, Report, Verdict
from .run import verify

__all__ = ["Finding", "Report", "Verdict", "verify"]
