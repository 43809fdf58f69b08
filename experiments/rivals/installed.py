"""Import the libraries of the rivals when one is made, so that no other run needs them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

PEERS = Path(sys.prefix) / "peers"
"""Where ``make peers`` installs torchao, outside the import path, because transformers imports it if it can."""


def pytorch_optimizer() -> ModuleType:
    """Return the package ``pytorch_optimizer``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("pytorch_optimizer")
    except ModuleNotFoundError as error:
        raise ValueError(
            "this arm needs pytorch-optimizer; install the project with its extra: pip install -e '.[experiments]'"
        ) from error


def torchao(part: str) -> ModuleType:
    """Return a module of torchao from the folder of ``make peers``; the import path stays as it is.

    Args:
        part: the module's name below ``torchao``, such as ``optim``.

    Raises:
        ValueError: torchao is not there.
    """
    path = [*sys.path]
    sys.path.append(str(PEERS))
    try:
        return importlib.import_module(f"torchao.{part}")
    except ModuleNotFoundError as error:
        raise ValueError(f"this arm needs torchao, which is not in {PEERS}; run `make peers`") from error
    finally:
        sys.path[:] = path
