"""Models of transformers from a configuration alone: shapes on the meta device, no weights, no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def model_from_config(path: str | os.PathLike[str]) -> nn.Module:
    """The model a transformers configuration describes, on the meta device.

    Args:
        path: a config JSON, or a directory with a ``config.json``. The class is the first of "architectures" that
            transformers has, else the causal language model of "model_type", else its base model. The parameters have
            the config's dtype. Code that comes with a configuration is never run.

    Returns:
        the model; its parameters have shapes and dtypes and no values.

    Raises:
        FileNotFoundError: no such file, or a directory without ``config.json``.
        ValueError: not a transformers configuration, or one whose model cannot be built.
        ImportError: transformers is not installed.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"config path {str(path)!r}: {file} does not exist; give a config JSON or its directory"
        )
    document = _read(file)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"config {str(file)!r} needs transformers to be built: pip install transformers") from error
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if (kind := document["model_type"]) not in known:
        raise ValueError(
            f"config {file}: model_type={kind!r} is unknown to transformers {transformers.__version__}; upgrade it, or "
            "give module:attribute, a function of yours that builds the model"
        )
    try:
        config = transformers.AutoConfig.for_model(**document)
        with torch.device("meta"):
            return _class_of(transformers, config, document)._from_config(config)
    except Exception as error:  # whatever its validators raise: the file is the caller's
        raise ValueError(
            f"config {file}: transformers {transformers.__version__} cannot build a {kind!r} model from it "
            f"({type(error).__name__}: {error}); check the values, or give module:attribute instead"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    """The configuration as a dict with a model_type."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"config {file} is not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("model_type"), str):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(
            f"config {file} has no 'model_type' (found {found}); give a transformers config.json, or module:attribute"
        )
    return document


def _class_of(transformers: Any, config: Any, document: dict[str, Any]) -> Any:
    """The model class: what the configuration names, else a language model of its type, else the base model."""
    for name in document.get("architectures") or ():
        if isinstance(found := getattr(transformers, str(name), None), type):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise ValueError(f"no model class for {type(config).__name__}; name one in 'architectures'")
