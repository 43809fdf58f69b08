"""From what the user names (a configuration, a shipped architecture, a function) to a model without weights."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimizer.partition import discover

from .sharding import Parameter

_CONFIGS = Path(__file__).with_name("configs")
_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
_RUNTIME_ONLY = ("quantization_config", "torch_dtype", "dtype", "auto_map", "transformers_version")
"""Keys that say how weights were stored or loaded, not which parameters there are."""


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
    return _read(path)


def load_target(target: str) -> Target:
    """The model a command line names.

    Args:
        target: a shipped architecture's name, a transformers configuration (file, or folder with config.json), or
            ``module:attribute`` (a module, or a function that makes one; called with ``meta`` as default device).

    Raises:
        ValueError: no such target; unreadable JSON; a configuration without an architecture transformers knows.
        ImportError: a configuration is asked for and transformers is not installed.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"target {target!r} is a folder without config.json; give the configuration file itself")
        return Target(target, from_config(_read(path / "config.json"), target))
    if path.is_file():
        return Target(target, from_config(_read(path), target))
    if target in shipped():
        document = facts(target)
        return Target(target, from_config(document["config"], target), document)
    if ":" in target:
        return Target(target, _from_code(target))
    raise ValueError(
        f"target {target!r} is neither a file, nor a folder with config.json, nor module:function, nor one of the "
        f"shipped architectures {', '.join(shipped())}"
    )


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


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that says where it stops being one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"target {str(path)!r} cannot be read as JSON: {error}; give a model's config.json") from error
    if not isinstance(document, dict):
        raise ValueError(
            f"target {str(path)!r} holds a JSON {type(document).__name__}, not an object; give config.json"
        )
    return document


def from_config(document: dict[str, Any], name: str) -> nn.Module:
    """A transformers model on ``meta`` from the keys of its configuration.

    The class named in ``architectures`` is built where transformers has it; else the causal language model of the
    ``model_type``, else the encoder-decoder, else the bare model.

    Raises:
        ValueError: neither ``model_type`` nor ``architectures`` is there, or transformers knows neither.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"target {name!r} is a transformers configuration and transformers is not installed; "
            "pip install transformers, or give module:function instead"
        ) from error
    keys = {key: value for key, value in document.items() if key not in _RUNTIME_ONLY}
    architecture = next((a for a in keys.get("architectures") or [] if isinstance(a, str)), None)
    named = getattr(transformers, architecture, None) if architecture else None
    config_class = _config_class(transformers, keys.get("model_type"), named)
    if config_class is None:
        raise ValueError(
            f"configuration {name!r} has model_type={keys.get('model_type')!r} and architectures="
            f"{document.get('architectures')!r}, which transformers {transformers.__version__} does not know; set "
            "model_type to one it does (for example 'llama'), or give module:function"
        )
    with torch.device("meta"):
        try:
            config = config_class.from_dict(keys)
            if named is not None and getattr(named, "config_class", None) is config_class:
                model: nn.Module = named(config)
            else:
                model = _auto(transformers, config).from_config(config)
        except Exception as error:  # whatever a configuration class or a constructor dislikes about these keys
            raise ValueError(f"configuration {name!r} does not build: {type(error).__name__}: {error}") from error
    return model


def _config_class(transformers: Any, model_type: Any, named: Any) -> Any:
    """The configuration's class: of the model type, else of the architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    return getattr(named, "config_class", None)


def _auto(transformers: Any, config: Any) -> Any:
    """The first of transformers' automatic classes that has a model for this configuration."""
    for name in _AUTO:
        if type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    return transformers.AutoModel


def _from_code(target: str) -> nn.Module:
    """The model at ``module:attribute``."""
    name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"target {target!r} cannot be imported: {error}; write module:function for something importable from here"
        ) from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"target {target!r} is a {type(found).__name__}; name a torch.nn.Module or a function")
        with torch.device("meta"):
            found = found()
    if not isinstance(found, nn.Module):
        raise ValueError(f"target {target!r} gave a {type(found).__name__}, not a torch.nn.Module; return the model")
    return found
