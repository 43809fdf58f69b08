"""``python -m optimizer convert IN OUT --model TARGET``: another optimizer's state in a file, made ours."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_command(subparsers: Any) -> None:
    """Register ``convert`` with the command line's subparsers; the parsed arguments carry ``run``."""
    command = subparsers.add_parser(
        "convert",
        help="a checkpoint of AdamW, Adam, adam-mini or other rules, made into one of AdamMini",
        description="Second moments become means over the new blocks; everything else in the file is carried over.",
    )
    command.add_argument(
        "source",
        metavar="IN",
        help="file of torch.save, a state dict of an optimizer or around one; or "
        "a folder of torch.distributed.checkpoint",
    )
    command.add_argument("out", metavar="OUT", help="file to write; may be IN")
    command.add_argument("--model", required=True, help="shipped name, config.json or its folder, or module:function")
    command.add_argument("--rules", default="adam_mini", help="shipped set or rules file (default: adam_mini)")
    command.add_argument("--from", dest="kind", choices=("auto", "adam", "adam-mini", "ours"), default="auto",
                         help="whose state it must be (default: what it looks like)")  # fmt: skip
    command.add_argument("--key", help="where the optimizer's state is in the file, for example optimizers.0")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Carry out the parsed command and say what it did.

    Raises:
        ValueError, OSError: as ``convert_file``.
    """
    import torch

    from ..targets import load_target
    from .file import convert_file

    with torch.device("meta"):  # a function that makes a model makes one without values
        model = load_target(arguments.model)
    report = convert_file(
        arguments.source, arguments.out, model, arguments.rules, kind=arguments.kind, key=arguments.key
    )
    before, after = report.values
    lines = [
        f"{arguments.source}: state of {report.kind!r}, {report.parameters} parameters",
        f"{arguments.out}: rules {report.rules!r}, second moments {before:,} -> {after:,} values "
        f"({report.rebuilt} rebuilt from block means)",
    ]
    if report.without:
        few = ", ".join(report.without[:3]) + (", ..." if len(report.without) > 3 else "")
        lines.append(f"without state: {len(report.without)} trainable parameters of the model ({few})")
    sys.stdout.write("\n".join(lines) + "\n")
