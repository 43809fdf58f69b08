"""From a model, on any device, to what a plan is made of."""

from __future__ import annotations

from torch import nn

from ...partition import discover
from .sharding import Parameter


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Every parameter with its anatomy, tied weights once, in the model's order.

    Raises:
        ValueError: the model has no parameters; or as ``discover``.
    """
    anatomies = discover(model)
    if not anatomies:
        raise ValueError(f"the model ({type(model).__name__}) has no parameters; there is nothing to plan")
    tensors = dict(model.named_parameters())
    return [Parameter(name, anatomy, tensors[name].requires_grad) for name, anatomy in anatomies.items()]
