"""What the commands of ``paper_figures`` do with what they cannot read: one line on stderr, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Around what reads results.

    Args:
        kinds: the exceptions whose message names the file, what is wrong with it, and the next action.

    Raises:
        SystemExit: code 2, after the message; its text is the message, for who calls a ``main`` from Python.
    """
    try:
        yield
    except kinds as error:
        sys.stderr.write(f"error: {error}\n")
        ended = SystemExit(str(error))
        ended.code = 2
        raise ended from error
