"""Deprecated path of ``optimizer.wrappers.torchtitan``."""

from ..wrappers.torchtitan import NAME, AdamMiniContainer, default_adam_mini

__all__ = ["NAME", "AdamMiniContainer", "default_adam_mini"]
