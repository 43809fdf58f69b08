"""Parameter groups: what a model's are, and what is known of the parameters in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .partition import Anatomy, discover


def describe(group: Mapping[str, Any], g: int, i: int) -> str:
    """A parameter in words, for messages."""
    names = group.get("param_names") or []
    return f"parameter {i} of group {g} ({names[i] if i < len(names) else 'unnamed'})"


def anatomies_by_identity(model: nn.Module) -> dict[int, tuple[str, Anatomy]]:
    """Name and anatomy by parameter identity, for as long as the groups are being made."""
    parameters = dict(model.named_parameters())
    return {id(parameters[name]): (name, a) for name, a in discover(model).items() if name in parameters}


def named(group: Mapping[str, Any]) -> list[tuple[Tensor, str]]:
    """(parameter, name or an empty one) of a group."""
    names = group.get("param_names") or [""] * len(group["params"])
    return list(zip(group["params"], names, strict=True))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, with names: what decays, and norms and biases, which do not.

    Raises:
        ValueError: nothing in the model is trainable.
    """
    anatomies = discover(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; unfreeze some before building the optimizer")
    # What FSDP flattened into one parameter has no name of its own; its layout knows what in it does not decay.
    decays = {name: name not in anatomies or anatomies[name].decays for name, _ in trainable}
    decaying = {"params": [(name, p) for name, p in trainable if decays[name]]}
    rest = {"params": [(name, p) for name, p in trainable if not decays[name]], "weight_decay": 0.0}
    return [group for group in (decaying, rest) if group["params"]]
