"""Error handling of the commands of ``paper_figures``: unreadable results give one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions about unreadable results into a one-line message and exit code 2.

    Args:
        kinds: the exceptions whose message names the file, what is wrong with it, and the next action.

    Raises:
        SystemExit: one of ``kinds`` was raised. Its code is 2, and its text is the message, for callers in Python.
    """
    try:
        yield
    except kinds as error:
        sys.stderr.write(f"error: {error}\n")
        exit_error = SystemExit(str(error))
        exit_error.code = 2
        raise exit_error from error
