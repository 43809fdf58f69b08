"""Import a workload's library, or say how to install it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators that torchvision describes when it is imported."""
TAKES_TORCHVISION = ("timm", "torchvision", "transformers", "trl", "peft", "diffusers")
"""Libraries that import torchvision where it is installed."""
INSTALL = "run `make setup-workloads` and start the run with .venv/workloads/bin/python"


def library(name: str, needed_by: str, install: str = INSTALL) -> ModuleType:
    """Import a library.

    Args:
        name: name of the module.
        needed_by: what needs it, for the message.
        install: how to install it, for the message.

    Raises:
        RuntimeError: it is not installed, or cannot be imported.
    """
    if name.partition(".")[0] in TAKES_TORCHVISION:
        _declare_operators()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{needed_by} needs the library {name.partition('.')[0]} ({error}); {install}") from error


def _declare_operators() -> None:
    """Declare torchvision's operators if its compiled library cannot be loaded.

    Wheels of torchvision on the package registry are built for CUDA. Beside a CPU build of torch their library does
    not load, and then torchvision cannot be imported, because it describes two operators that are not there.
    Classifiers use none of its operators.
    """
    for _ in range(len(OPERATORS) + 1):
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return  # the caller's import names what is missing
        except RuntimeError as error:
            missing = [name for name in OPERATORS if f"torchvision::{name} does not exist" in str(error)]
            if not missing:
                raise
            torch.library.define(f"torchvision::{missing[0]}", OPERATORS[missing[0]])
            for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[module]  # the part of the package that was imported before the error
