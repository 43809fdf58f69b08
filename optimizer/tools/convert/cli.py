"""``python -m optimizer convert IN OUT --model TARGET``: convert a checkpoint's optimizer state to AdamMini's."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_command(subparsers: Any) -> None:
    """Register ``convert`` with the command line's subparsers. The parsed arguments have the attribute ``run``."""
    command = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of AdamW, Adam, adam-mini or of other rules to AdamMini",
        description="Second moments become means over the new blocks; everything else in the file is carried over.",
    )
    command.add_argument(
        "source",
        metavar="IN",
        help="file of torch.save that is or contains the state dict of an optimizer, or a folder of "
        "torch.distributed.checkpoint",
    )
    command.add_argument("out", metavar="OUT", help="file to write; may be IN")
    command.add_argument("--model", required=True, help="shipped name, config.json or its folder, or module:function")
    command.add_argument("--rules", default="adam_mini", help="shipped set or rules file (default: adam_mini)")
    command.add_argument(
        "--from",
        dest="kind",
        choices=("auto", "adam", "adam-mini", "ours"),
        default="auto",
        help="the optimizer that the state must be of (default: detected from the state)",
    )
    command.add_argument("--key", help="key of the optimizer's state in the file, for example optimizers.0")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert the file and print a summary.

    Raises:
        ValueError: the target is not a model, or the file's state cannot be converted.
        OSError: a file cannot be read or written.
    """
    import torch

    from ..targets import load_target
    from .file import convert_file

    with torch.device("meta"):  # The model needs no values, only names and shapes.
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
