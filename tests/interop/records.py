"""What the checks found, kept so that each can run alone: check -> rows, in one file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("results.json")
Rows = dict[str, list["Row"]]


@dataclass(frozen=True)
class Row:
    """A line of the matrix."""

    door: str
    """The integration, in a word: "Accelerate"."""
    case: str
    """Which use of it: "FSDP2, gradient accumulation"."""
    versions: str
    """Of the libraries it goes through: "accelerate 1.15.0, torch 2.13.0"."""
    on: str
    """Processes and how they talk: "2 ranks, gloo"."""
    ran: str
    """The command or the script, and what it trained."""
    result: str
    """A number and what it is."""


def versions(*libraries: str) -> str:
    """Names of installed distributions -> what is installed."""
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in libraries)


def load(file: Path = FILE) -> Rows:
    """What was found so far."""
    if not file.exists():
        return {}
    return {check: [Row(**row) for row in rows] for check, rows in json.loads(file.read_text()).items()}


def store(check: str, rows: list[Row], failed: str = "", file: Path = FILE) -> None:
    """Replace a check's rows; those of a failed one stay, with the failure as their result.

    Args:
        check: pytest's name of it.
        rows: what it recorded.
        failed: the error's first line, if it failed.
        file: where all rows are.
    """
    known = load(file)
    if failed:
        rows = rows or known.get(check) or [Row("unknown", check, "", "", "", "")]
        rows = [replace(row, result=f"FAILED: {failed}") for row in rows]
    _write({**known, check: rows} if rows else {name: own for name, own in known.items() if name != check}, file)


def prune(checks: set[str], file: Path = FILE) -> None:
    """Drop the rows of checks that are gone.

    Args:
        checks: pytest's names of all checks in the files that they are in.
        file: where all rows are.
    """
    known, whole = load(file), {check.partition("::")[0] for check in checks}
    kept = {check: rows for check, rows in known.items() if check in checks or check.partition("::")[0] not in whole}
    if kept != known:
        _write(kept, file)


def _write(kept: Rows, file: Path) -> None:
    ordered = {name: [asdict(row) for row in kept[name]] for name in sorted(kept)}
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, file)
