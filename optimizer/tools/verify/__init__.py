"""Prove a partition from the model's own gradients."""

from .report import Finding, Report, Verdict
from .run import verify

__all__ = ["Finding", "Report", "Verdict", "verify"]
