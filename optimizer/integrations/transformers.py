"""Deprecated path of ``optimizer.wrappers.transformers``."""

from ..wrappers.transformers import model_from_config, model_from_document

__all__ = ["model_from_config", "model_from_document"]
