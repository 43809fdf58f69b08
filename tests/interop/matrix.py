"""Writes the table of docs/integrations.md from what the checks recorded: ``python -m tests.interop.matrix``."""

from __future__ import annotations

from pathlib import Path

from tests.interop.records import FILE, Row, Rows, load

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "integrations.md"
START, END = "<!-- matrix: written by python -m tests.interop.matrix -->", "<!-- end of matrix -->"
COLUMNS = ("integration", "case", "versions", "on", "what was run", "result")


def alive(rows: Rows, root: Path = ROOT) -> list[Row]:
    """Rows of checks that still exist, by door and case."""
    found = []
    for check, own in rows.items():
        path, _, name = check.partition("::")
        source = root / path
        if source.exists() and f"def {name.partition('[')[0]}(" in source.read_text():
            found += own
    return sorted(found, key=lambda row: (row.door.lower(), row.case.lower(), row.on))


def table(rows: list[Row]) -> str:
    """Rows as a table."""
    cells = [COLUMNS, ("---",) * len(COLUMNS)]
    cells += [(row.door, row.case, row.versions, row.on, row.ran, row.result) for row in rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in cells)


def written(page: str, rows: list[Row]) -> str:
    """The page with its table replaced.

    Raises:
        ValueError: a page without exactly one pair of marks.
    """
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"{PAGE.name} must have the lines {START!r} and {END!r} once each, in this order")
    before, rest = page.split(START)
    return f"{before}{START}\n{table(rows)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    rows = alive(load(FILE))
    PAGE.write_text(written(PAGE.read_text(), rows))
    failed = sum(row.result.startswith("FAILED") for row in rows)
    print(f"{PAGE.relative_to(ROOT)}: {len(rows)} rows, {failed} of them failed")
