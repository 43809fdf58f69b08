"""Describe the parameters of a model for a plan."""

from __future__ import annotations

from torch import nn

from ...partition import discover
from .sharding import Parameter


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Return the parameters of a model, on any device, in the model's order. Tied weights occur once.

    Raises:
        ValueError: the model has no parameters, or a configuration contradicts its module's weights.
    """
    anatomies = discover(model)
    if not anatomies:
        raise ValueError(f"the model ({type(model).__name__}) has no parameters; there is nothing to plan")
    tensors = dict(model.named_parameters())
    return [Parameter(name, anatomy, tensors[name].requires_grad) for name, anatomy in anatomies.items()]
