"""Commands to explain, verify, plan and convert: python -m optimizer explain package.module:make_model"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .partition.schema import json_schema
from .tools.architectures import shipped
from .tools.convert import cli as convert
from .tools.explain import render
from .tools.explain.rows import compare, explanation
from .tools.plan import cli as plan
from .tools.targets import UserCodeError, load_target
from .tools.verify import cli as verify


def _explain(arguments: argparse.Namespace) -> None:
    """Print the role and layout of every parameter, or the differences between two rule sets."""
    if arguments.diff and arguments.rules:
        raise ValueError(f"--rules {arguments.rules!r} cannot be combined with --diff {arguments.diff}; leave one out")
    model = load_target(arguments.target)
    if arguments.diff:
        comparison = compare(model, *arguments.diff)
        shown = comparison.collapsed() if arguments.collapse else comparison
        _show(
            arguments,
            lambda: render.comparison_json(comparison),
            lambda: render.comparison_text(shown),
            lambda width: render.comparison_table(shown, width),
        )
    else:
        explained = explanation(model, arguments.rules or "adam_mini")
        rows = explained.collapsed() if arguments.collapse else explained
        _show(
            arguments,
            lambda: render.explanation_json(explained),
            lambda: render.explanation_text(rows),
            lambda width: render.explanation_table(rows, width),
        )


def _show(
    arguments: argparse.Namespace,
    document: Callable[[], dict[str, Any]],
    text: Callable[[], str],
    table: Callable[[int], tuple[str, Any, list[str]]],
) -> None:
    """Print JSON with ``--json``, a table in a terminal if rich is installed, and plain text otherwise.

    Args:
        arguments: the parsed command line.
        document: returns the JSON document.
        text: returns the plain text.
        table: returns the title, body and closing lines of a table of the given width.
    """
    if arguments.json:
        print(json.dumps(document(), indent=1))
        return
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            console = Console()
            title, body, closing = table(console.width)
            console.print(title, markup=False, highlight=False)
            console.print(body)
            console.print("\n".join(closing), markup=False, highlight=False)
            return
    print(text())


def _schema(_: argparse.Namespace) -> None:
    """Print the JSON Schema of a rules file."""
    print(json.dumps(json_schema(), indent=2))


def _failure(message: str, code: int) -> SystemExit:
    """Write one line to stderr and return the exception that ends the command.

    The exception also has the message, for code that calls ``main``.
    """
    sys.stderr.write(f"error: {message}\n")
    failure = SystemExit(message)
    failure.code = code
    return failure


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command.

    Args:
        argv: the arguments; None for those of the process.

    Raises:
        SystemExit: code 2 if a value is invalid, after one line that names it; code 1 if a function or module of the
            user raised an exception, after its traceback; otherwise the exit code of the command.
    """
    parser = argparse.ArgumentParser(prog="python -m optimizer", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("explain", help="the role and layout of every parameter, and the reason")
    command.add_argument(
        "target",
        help="module:attribute of a model or of a function that makes one; a config.json or its directory; or one of "
        f"{', '.join(shipped())}",
    )
    command.add_argument("--rules", help="name of a shipped set, or path of a rules file (default: adam_mini)")
    command.add_argument("--json", action="store_true", help="print one JSON document with every parameter")
    command.add_argument(
        "--diff",
        nargs=2,
        metavar="RULES",
        help="print only the parameters whose layout differs between two sets of rules",
    )
    command.add_argument(
        "--no-collapse",
        dest="collapse",
        action="store_false",
        help="print a row for every layer, even if equal",
    )
    command.set_defaults(run=_explain)
    commands.add_parser("schema", help="print the JSON Schema of a rules file").set_defaults(run=_schema)
    verify.add_command(commands)
    plan.add_command(commands)
    convert.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserCodeError as error:
        cause = error.__cause__
        assert cause is not None
        traceback.print_exception(type(cause), cause, _from_user_code(cause.__traceback__))
        raise _failure(str(error), 1) from error
    except (ValueError, OSError, ImportError) as error:
        raise _failure(str(error), 2) from error


def _from_user_code(frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the first frame outside this package and the import machinery."""
    package = str(Path(__file__).parent)
    while frames is not None and frames.tb_next is not None:
        name = frames.tb_frame.f_code.co_filename
        if not (name.startswith((package, "<frozen importlib")) or name == importlib.__file__):
            break
        frames = frames.tb_next
    return frames


if __name__ == "__main__":
    main()
