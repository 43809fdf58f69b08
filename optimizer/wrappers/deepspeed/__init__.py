"""DeepSpeed: starting it with AdamMini, and the flat tensors it steps in place of parameters."""

from .launch import config_for_adam_mini, initialize

__all__ = ["config_for_adam_mini", "initialize"]
