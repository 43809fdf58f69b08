"""``python -m optimizer verify``: the command line of ``verify``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..targets import call, load_target, resolve
from .run import verify


def add_command(commands: Any) -> None:
    """Register ``verify`` with the command line's subparsers. The parsed arguments have the attribute ``run``."""
    command = commands.add_parser("verify", help="prove the layouts of queries, keys and values from gradients")
    command.add_argument(
        "target",
        help="module:attribute, which is a small model with weights or a function that returns one; or the name of a "
        "shipped architecture, of which a small model is built",
    )
    command.add_argument(
        "--inputs",
        metavar="module:function",
        help="a function that returns what to call the model with: a tensor, a tuple of arguments, a dict of keyword "
        "arguments, or a list of these (default: guessed)",
    )
    command.add_argument(
        "--every-layer", action="store_true", help="check every layer (default: one of several equal layers)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the perturbed weights and guessed inputs")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Verify the model and print the report.

    Raises:
        ValueError: the target or the inputs cannot be imported, or do not have the required form.
        UserCodeError: the user's module or function raised an error.
        SystemExit: with status 1 if gradients contradict a layout.
    """
    inputs = None
    if arguments.inputs:
        inputs = resolve(arguments.inputs, "inputs")
        inputs = call(inputs, arguments.inputs, "inputs") if callable(inputs) else inputs
    model = load_target(arguments.target, small=True)
    report = verify(model, inputs, seed=arguments.seed, every_layer=arguments.every_layer)
    if arguments.json:
        findings = [
            {"name": f.name, "verdict": f.verdict.value, "claim": f.claim, "why": f.why} for f in report.findings
        ]
        text = json.dumps({"findings": findings, "forwards": list(report.forwards)}, indent=1)
    else:
        text = str(report)
    sys.stdout.write(text + "\n")
    if report.contradicted:
        raise SystemExit(1)
