"""Write the tables of a page: ``python -m experiments.rivals docs/rivals.md``. All libraries have to be installed."""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.commandline import refusals

from .table import write


def main(page: tyro.conf.Positional[Path] = Path("docs/rivals.md")) -> None:
    """Write the tables of rivals.

    Args:
        page: a Markdown file with the markers of the tables.
    """
    with refusals(ValueError, OSError):
        write(page)


if __name__ == "__main__":
    tyro.cli(main)
