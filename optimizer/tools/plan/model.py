"""From what the user names (a configuration, a shipped architecture, a function) to a model without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...partition import discover
from ...wrappers.transformers import model_from_document
from .. import targets
from .sharding import Parameter

_CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Target:
    """A model to plan for.

    Attributes:
        name: how the user called it.
        model: the model, its parameters normally on ``meta``.
        facts: the shipped document (title, source, reported numbers); empty for anything else.
    """

    name: str
    model: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)


def shipped() -> list[str]:
    """Names of the architectures that come with the package, small ones first."""
    return sorted((path.stem for path in _CONFIGS.glob("*.json")), key=lambda name: facts(name)["order"])


def facts(name: str) -> dict[str, Any]:
    """The shipped document of an architecture: title, source, order, config, reported memory.

    Raises:
        ValueError: no such architecture.
    """
    path = _CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"target {name!r} is not one of the shipped architectures {shipped()}")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def load_target(target: str) -> Target:
    """The model a command line names.

    Args:
        target: a shipped architecture's name, a transformers configuration (file, or folder with config.json), or
            ``module:attribute`` (a module, or a function that makes one; called with ``meta`` as default device).

    Raises:
        ValueError: no such target; unreadable JSON; a configuration without an architecture transformers knows.
        ImportError: a configuration is asked for and transformers is not installed.
    """
    if target in shipped():
        document = facts(target)
        return Target(target, model_from_document(document["config"], target), document)
    if ":" not in target and not Path(target).exists():
        raise ValueError(
            f"target {target!r} is neither a file, nor a folder with config.json, nor module:function, nor one of the "
            f"shipped architectures {', '.join(shipped())}"
        )
    with torch.device("meta"):
        return Target(target, targets.load_target(target))


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
