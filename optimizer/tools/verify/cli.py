"""``python -m optimizer verify``: the command line of ``verify``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..targets import call, load_target, resolve
from .run import verify


def add_command(commands: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    command = commands.add_parser("verify", help="prove the layouts of queries, keys and values from gradients")
    command.add_argument("target", help="module:attribute, a small model with weights or a function that "
                         "makes one; or a shipped architecture, which is made small")  # fmt: skip
    command.add_argument(
        "--inputs",
        metavar="module:function",
        help="a function that returns what to call the model with: a tensor, a tuple of arguments, a dict of keyword "
        "arguments, or a list of these (default: guessed)",
    )
    command.add_argument("--every-layer", action="store_true", help="look at every layer, however alike")
    command.add_argument("--seed", type=int, default=0, help="of the perturbed weights and guessed inputs")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Verify and print; exit status 1 where gradients contradict a layout.

    Raises:
        ValueError, UserCodeError: as ``load_target``, for the target and for the inputs.
    """
    given = None
    if arguments.inputs:
        given = resolve(arguments.inputs, "inputs")
        given = call(given, arguments.inputs, "inputs") if callable(given) else given
    model = load_target(arguments.target, small=True)
    report = verify(model, given, seed=arguments.seed, every_layer=arguments.every_layer)
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
