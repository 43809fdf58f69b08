"""Deprecated path of ``optimizer.wrappers.huggingface``."""

from ..wrappers.huggingface import AdamMiniMixin, adam_mini

__all__ = ["AdamMiniMixin", "adam_mini"]
