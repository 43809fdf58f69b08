"""From a shell: ``python -m optimizer explain package.module:make_model [--rules adam_mini]``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from torch import nn

from .partition import explain
from .plan import cli as plan


def _model(target: str) -> nn.Module:
    """The model at ``module:attribute``: a module, or something callable that makes one."""
    name, _, attribute = target.partition(":")
    if not attribute:
        raise SystemExit(f"target {target!r} must be written module:attribute, for example my_model:make_model")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"target {target!r} cannot be imported: {error}") from error
    model = found() if not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise SystemExit(f"target {target!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m optimizer", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("explain", help="what every parameter is taken for, and why")
    command.add_argument("target", help="module:attribute, a model or a callable that makes one")
    command.add_argument("--rules", default="adam_mini", help="shipped set or path to a rules file")
    plan.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        if hasattr(arguments, "run"):
            return arguments.run(arguments)
        print(explain(_model(arguments.target), arguments.rules))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
