"""Load the model that a command line names: a shipped architecture, ``module:attribute`` or a configuration file."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from .architectures import facts, shipped


class UserCodeError(Exception):
    """The user's code raised an error, either when its module was imported or when its function was called.

    ``__cause__`` is the user's error. Its traceback shows the line of the user's code that raised it.
    """


def load_target(target: str, *, small: bool = False) -> nn.Module:
    """Return the model that a command-line target names.

    Args:
        target: one of three forms: ``module:attribute``, where the attribute is a model or a callable without arguments
            that returns one; the path of a transformers config JSON, or of a directory that contains ``config.json``;
            or the name of a shipped architecture. Models of the last two forms have their parameters on the ``meta``
            device, without values.
        small: for a shipped architecture, return a small model of the same architecture, with weights.

    Raises:
        ValueError: the target has none of the three forms, cannot be imported, or does not return a model.
        FileNotFoundError: the path does not exist.
        ImportError: the target is a configuration, and transformers is not installed.
        UserCodeError: the user's module or function raised an error.
    """
    if target in shipped():
        from ..wrappers.transformers import model_from_document

        document = facts(target)
        model = model_from_document(document["config"] | (document["small"] if small else {}), target)
        return type(model)(model.config) if small else model
    if Path(target).exists() or target.endswith(".json") or (":" not in target and os.sep in target):
        from ..wrappers.transformers import model_from_config

        return model_from_config(target)
    attribute = resolve(target, "target")
    if isinstance(attribute, nn.Module):
        return attribute
    if not callable(attribute):
        raise ValueError(
            f"target {target!r} is a {type(attribute).__name__}, neither a model nor a function that makes one"
        )
    model = call(attribute, target, "target")
    if not isinstance(model, nn.Module):
        raise ValueError(f"target {target!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def call(function: Any, path: str, what: str) -> Any:
    """Call a function of the user without arguments and return its result.

    Args:
        function: the function to call.
        path: ``module:attribute`` of the function as written on the command line, for error messages.
        what: name of the command-line argument, for error messages.

    Raises:
        ValueError: the function requires arguments.
        UserCodeError: the function raised an error.
    """
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{what} {path!r} cannot be called without arguments ({error}); wrap it in a function"
        ) from error
    except ValueError:  # Some built-in functions have no signature that could be inspected.
        pass
    try:
        return function()
    except Exception as error:
        raise UserCodeError(f"{what} {path!r} raised {type(error).__name__}: {error}") from error


def resolve(path: str, what: str) -> Any:
    """Import the object at ``module:attribute`` and return it.

    Args:
        path: ``module:attribute`` as written on the command line.
        what: name of the command-line argument, for error messages.

    Raises:
        ValueError: ``path`` has another form, or the module or its attribute does not exist.
        UserCodeError: the module exists and raised an error when it was imported.
    """
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise ValueError(
            f"{what} {path!r} must be written module:attribute, for example my_model:make_model"
            + (
                f", or be the path of a config.json or its directory, or one of {', '.join(shipped())}"
                if what == "target"
                else ""
            )
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # The named module or a package around it is missing, as opposed to a module that it imports.
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ValueError(f"{what} {path!r} cannot be imported: {error}; run from the folder it is in") from error
        raise UserCodeError(
            f"{what} {path!r} cannot be imported: {name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error}; run from the folder it is in") from error
