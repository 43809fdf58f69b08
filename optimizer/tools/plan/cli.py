"""``python -m optimizer plan TARGET``: print memory per rank; ``--table FILE`` writes the table of docs/memory.md."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from ...partition.rules import shipped as shipped_rules
from ..architectures import shipped
from ..targets import load_target
from . import report, table
from .activations import estimate
from .memory import DEFAULT_RULES, make_plan
from .model import parameters_of
from .sharding import DTYPES, MOMENT_DTYPES, Setup


def add_command(subparsers: Any) -> None:
    """Register ``plan`` with the command line's subparsers. The parsed arguments have the attribute ``run``."""
    command = subparsers.add_parser(
        "plan",
        help="memory of training a model, per rank and optimizer, from its architecture alone",
        description=f"Shipped architectures: {', '.join(shipped())}.",
    )
    command.add_argument("target", nargs="?", help="shipped name, config.json or its folder, or module:function")
    command.add_argument("--world", type=int, default=1, help="number of all ranks (default 1)")
    command.add_argument(
        "--tp", type=int, default=1, help="number of tensor-parallel ranks, which divides --world (default 1)"
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument("--fsdp", action="store_true", help="FSDP2: parameters, gradients and state cut along axis 0")
    how.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="DeepSpeed stage; 0 is DDP (default)")
    names = ", ".join(shipped_rules())
    command.add_argument(
        "--rules", default=",".join(DEFAULT_RULES), help=f"comma-separated names or paths; names: {names}"
    )
    command.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="dtype of parameters and gradients")
    command.add_argument(
        "--exp-avg-dtype",
        choices=MOMENT_DTYPES,
        help="dtype or format of Adam-mini's first moment (default: dtype of the parameters that it steps)",
    )
    command.add_argument("--master", action="store_true", help="keep an fp32 copy of 16-bit parameters")
    command.add_argument("--batch", type=int, help="micro-batch of one data-parallel rank, for an activation estimate")
    command.add_argument("--seq", type=int, help="tokens per sequence, for an activation estimate")
    command.add_argument("--json", action="store_true", help="print bytes as JSON")
    command.add_argument("--table", metavar="FILE", help="write the table of the shipped architectures as Markdown")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Make the plan and print it.

    Raises:
        ValueError: an argument is out of range, missing or contradicts another; the target is not a model; or the rules
            are invalid.
        FileNotFoundError: the target's or the rules' file does not exist.
        ImportError: the target needs transformers, which is not installed.
        UserCodeError: the user's module or function raised an error.
    """
    sys.stdout.write(_output(arguments) + "\n")


def _output(arguments: argparse.Namespace) -> str:
    """Return the text to print."""
    if arguments.table and arguments.target is not None:
        raise ValueError(
            f"--table {arguments.table!r} covers the shipped architectures; leave out {arguments.target!r}"
        )
    if arguments.table:
        return f"wrote {table.write(arguments.table)}"
    if arguments.target is None:
        raise ValueError(f"target is missing; pass config.json, module:function or one of {', '.join(shipped())}")
    if (arguments.batch is None) != (arguments.seq is None):
        raise ValueError(
            f"--batch {arguments.batch} and --seq {arguments.seq} go together: pass both for an estimate of activations"
        )
    sharding = "fsdp" if arguments.fsdp else f"zero{arguments.zero}" if arguments.zero else "ddp"
    setup = Setup(arguments.world, arguments.tp, sharding, arguments.dtype, arguments.exp_avg_dtype, arguments.master)
    rules = [name.strip() for name in arguments.rules.split(",") if name.strip()]
    with torch.device("meta"):  # The model needs no values, only names and shapes.
        model = load_target(arguments.target)
    plan = make_plan(parameters_of(model), setup, rules)
    activations = None
    if arguments.batch is not None:
        config = getattr(model, "config", None)
        activations = estimate(config, batch=arguments.batch, seq=arguments.seq, tp=arguments.tp)
    if arguments.json:
        return json.dumps(report.document(plan, arguments.target, activations), indent=1)
    return report.text(plan, arguments.target, activations)
