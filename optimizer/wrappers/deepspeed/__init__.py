"""DeepSpeed: how to start it with AdamMini, and the flat tensors that it steps instead of parameters."""

from .launch import config_for_adam_mini, initialize

__all__ = ["config_for_adam_mini", "initialize"]
