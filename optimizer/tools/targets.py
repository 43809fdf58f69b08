"""What a command is about: a shipped architecture, or the model behind ``module:attribute`` or a configuration file."""

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
    """Code of the user's raised an error: in a module that was imported, or in a function that was called.

    The error itself is ``__cause__``; its traceback says where, which no message of ours could.
    """


def load_target(target: str, *, small: bool = False) -> nn.Module:
    """The model a command-line target names.

    Args:
        target: ``module:attribute``, a model or something callable without arguments that makes one; the path of a
            transformers config JSON or of a directory with a ``config.json``; or a shipped architecture's name. The
            last two give parameters on the ``meta`` device, which have no values.
        small: of a shipped architecture, a small model with weights instead.

    Raises:
        ValueError: a target of no known form, one that cannot be imported, or one that makes no model.
        FileNotFoundError: a path that does not exist.
        ImportError: a configuration without transformers.
        UserCodeError: the user's module or function raised.
    """
    if target in shipped():
        from ..wrappers.transformers import model_from_document

        document = facts(target)
        model = model_from_document(document["config"] | (document["small"] if small else {}), target)
        return type(model)(model.config) if small else model
    if Path(target).exists() or target.endswith(".json") or (":" not in target and os.sep in target):
        from ..wrappers.transformers import model_from_config

        return model_from_config(target)
    found = resolve(target, "target")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ValueError(
            f"target {target!r} is a {type(found).__name__}, neither a model nor a function that makes one"
        )
    model = call(found, target, "target")
    if not isinstance(model, nn.Module):
        raise ValueError(f"target {target!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def call(function: Any, path: str, what: str) -> Any:
    """What a function of the user's returns, called without arguments.

    Args:
        function: what was found there.
        path: as written on the command line.
        what: the argument's name, for messages.

    Raises:
        ValueError: it needs arguments.
        UserCodeError: it raised.
    """
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{what} {path!r} cannot be called without arguments ({error}); wrap it in a function"
        ) from error
    except ValueError:  # some built-in functions have no signature to look at
        pass
    try:
        return function()
    except Exception as error:
        raise UserCodeError(f"{what} {path!r} raised {type(error).__name__}: {error}") from error


def resolve(path: str, what: str) -> Any:
    """The object at ``module:attribute``.

    Args:
        path: as written on the command line.
        what: the argument's name, for messages.

    Raises:
        ValueError: another form, or nothing to import there.
        UserCodeError: the module is there and raised when it was imported.
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
        if missing is not None and f"{name}.".startswith(f"{missing}."):  # the module itself, not one that it imports
            raise ValueError(f"{what} {path!r} cannot be imported: {error}; run from the folder it is in") from error
        raise UserCodeError(
            f"{what} {path!r} cannot be imported: {name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error}; run from the folder it is in") from error
