"""Models of the transformers library, built from a configuration on the meta device, without weights or network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..partition.documents import parse_json

_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
_STORAGE = ("quantization_config", "auto_map", "transformers_version")
"""Keys that describe how weights were stored, and do not affect which parameters the model has."""


def model_from_config(path: str | os.PathLike[str]) -> nn.Module:
    """Build the model of a transformers configuration file on the meta device.

    Args:
        path: a config JSON, or a directory with a ``config.json``.

    Returns:
        The model; its parameters have shapes and dtypes but no values.

    Raises:
        FileNotFoundError: the file does not exist, or the directory has no ``config.json``.
        ValueError: the file is no transformers configuration, or its model cannot be built.
        ImportError: transformers is not installed.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"config path {str(path)!r}: {file} does not exist; give a config JSON or its directory"
        )
    try:
        document = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {file} is not valid JSON ({error}); give a model's config.json") from error
    if not isinstance(document, dict):
        raise ValueError(f"config {file} holds a JSON {type(document).__name__}, not an object; give config.json")
    return model_from_document(document, str(file))


def model_from_document(document: Mapping[str, Any], name: str) -> nn.Module:
    """Build the model of a transformers configuration on the meta device.

    The class is the one named in "architectures" if transformers has it. Otherwise it is the causal language model of
    the "model_type", the encoder-decoder, or the bare model, whichever exists first. The parameters have the
    configuration's dtype. Code that comes with a configuration is never run.

    Args:
        document: the keys of the configuration.
        name: name of the configuration for error messages.

    Returns:
        The model; its parameters have shapes and dtypes but no values.

    Raises:
        ValueError: the document is no transformers configuration, or its model cannot be built.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"config {name!r} needs transformers to be built: pip install transformers, or give module:attribute, a "
            "function that makes the model"
        ) from error
    keys = {key: value for key, value in document.items() if key not in _STORAGE}
    classes = [getattr(transformers, str(a), None) for a in keys.get("architectures") or ()]
    named = next((candidate for candidate in classes if isinstance(candidate, type)), None)
    kind = keys.get("model_type")
    config_classes = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    config_class: Any = getattr(named, "config_class", None)
    if isinstance(kind, str) and kind in config_classes:
        config_class = config_classes[kind]
    if config_class is None:
        raise ValueError(
            f"config {name}: model_type={kind!r} and architectures={keys.get('architectures')!r} are unknown to "
            f"transformers {transformers.__version__}; set model_type to one it knows (for example 'llama'), upgrade "
            "it, or give module:attribute, a function of yours that builds the model"
        )
    try:
        config = config_class.from_dict(keys)
        model_class: Any = named if getattr(named, "config_class", None) is config_class else _automatic(config)
        with torch.device("meta"):
            model: nn.Module = model_class._from_config(config)
    except Exception as error:  # validators of transformers raise errors of any type
        raise ValueError(
            f"config {name}: transformers {transformers.__version__} cannot build a {kind!r} model from it "
            f"({type(error).__name__}: {error}); check the values, or give module:attribute instead"
        ) from error
    return model


def _automatic(config: Any) -> Any:
    """Return the model class of the first of transformers' automatic classes that has one for this configuration."""
    import transformers

    for name in _AUTO:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            model_class = mapping[type(config)]
            return model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    raise ValueError(f"no model class for {type(config).__name__}; name one in 'architectures'")
