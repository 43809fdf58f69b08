"""Models of transformers from a configuration alone: shapes on the meta device, no weights, no network."""

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
"""Keys that say how weights were stored, not which parameters there are."""


def model_from_config(path: str | os.PathLike[str]) -> nn.Module:
    """The model a transformers configuration file describes, on the meta device.

    Args:
        path: a config JSON, or a directory with a ``config.json``.

    Raises:
        FileNotFoundError: no such file, or a directory without ``config.json``.
        ValueError, ImportError: as ``model_from_document``.
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
    """The model the keys of a transformers configuration describe, on the meta device.

    The class is the one named in "architectures" where transformers has it, else the causal language model of the
    "model_type", else the encoder-decoder, else the bare model. The parameters have the configuration's dtype. Code
    that comes with a configuration is never run.

    Returns:
        the model; its parameters have shapes and dtypes and no values.

    Raises:
        ValueError: not a transformers configuration, or one whose model cannot be built.
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
    named = next((found for found in classes if isinstance(found, type)), None)
    kind = keys.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    config_class = known[kind] if isinstance(kind, str) and kind in known else getattr(named, "config_class", None)
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
    except Exception as error:  # whatever its validators raise: the file is the caller's
        raise ValueError(
            f"config {name}: transformers {transformers.__version__} cannot build a {kind!r} model from it "
            f"({type(error).__name__}: {error}); check the values, or give module:attribute instead"
        ) from error
    return model


def _automatic(config: Any) -> Any:
    """The first of transformers' automatic choices that has a model for this configuration."""
    import transformers

    for name in _AUTO:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise ValueError(f"no model class for {type(config).__name__}; name one in 'architectures'")
