"""Deprecated path of ``optimizer.wrappers.deepspeed``."""

from ..wrappers.deepspeed import config_for_adam_mini, initialize

__all__ = ["config_for_adam_mini", "initialize"]
