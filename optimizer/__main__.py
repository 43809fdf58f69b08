"""From a shell: ``python -m optimizer explain package.module:make_model [--rules adam_mini]``, or a config.json."""

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
    """Print what every parameter is taken for, or what two rule sets do differently."""
    if arguments.diff and arguments.rules:
        raise ValueError(f"--rules {arguments.rules!r} has no meaning beside --diff {arguments.diff}; leave one out")
    model = load_target(arguments.target)
    if arguments.diff:
        comparison = compare(model, *arguments.diff)
        shown = comparison.collapsed() if arguments.collapse else comparison
        _show(arguments, lambda: render.comparison_json(comparison), lambda: render.comparison_text(shown),
              lambda width: render.comparison_table(shown, width))  # fmt: skip
    else:
        found = explanation(model, arguments.rules or "adam_mini")
        rows = found.collapsed() if arguments.collapse else found
        _show(arguments, lambda: render.explanation_json(found), lambda: render.explanation_text(rows),
              lambda width: render.explanation_table(rows, width))  # fmt: skip


def _show(
    arguments: argparse.Namespace,
    document: Callable[[], dict[str, Any]],
    text: Callable[[], str],
    table: Callable[[int], tuple[str, Any, list[str]]],
) -> None:
    """JSON where it was asked for; a table as wide as the terminal where there is one; else plain text."""
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


def _ended(message: str, code: int) -> SystemExit:
    """The end of the command with one line on stderr; the message is the exception's, too, for who calls ``main``."""
    sys.stderr.write(f"error: {message}\n")
    ended = SystemExit(message)
    ended.code = code
    return ended


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command.

    Raises:
        SystemExit: with code 2 for a value that cannot be used, named in one line; with 1 where a function or module of
            the user's raised, after its traceback; or with the command's own verdict.
    """
    parser = argparse.ArgumentParser(prog="python -m optimizer", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("explain", help="what every parameter is taken for, and why")
    command.add_argument(
        "target",
        help="module:attribute, a model or a callable that makes one; a config.json, or its directory; or one of "
        f"{', '.join(shipped())}",
    )
    command.add_argument("--rules", help="shipped set or path to a rules file (default: adam_mini)")
    command.add_argument("--json", action="store_true", help="one JSON document with every parameter")
    command.add_argument(
        "--diff", nargs=2, metavar="RULES", help="only the parameters whose layout differs between two sets of rules"
    )
    command.add_argument(
        "--no-collapse", dest="collapse", action="store_false", help="a row for every layer, however alike"
    )
    command.set_defaults(run=_explain)
    commands.add_parser("schema", help="the JSON Schema of a rules file").set_defaults(run=_schema)
    verify.add_command(commands)
    plan.add_command(commands)
    convert.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserCodeError as error:
        cause = error.__cause__
        assert cause is not None
        traceback.print_exception(type(cause), cause, _beyond_ours(cause.__traceback__))
        raise _ended(str(error), 1) from error
    except (ValueError, OSError, ImportError) as error:
        raise _ended(str(error), 2) from error


def _beyond_ours(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame that is neither of this package nor of the import machinery."""
    here = str(Path(__file__).parent)
    while frames is not None and frames.tb_next is not None:
        name = frames.tb_frame.f_code.co_filename
        if not (name.startswith((here, "<frozen importlib")) or name == importlib.__file__):
            break
        frames = frames.tb_next
    return frames


if __name__ == "__main__":
    main()
