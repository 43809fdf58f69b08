"""Explanations and comparisons as plain text, as a table of rich's, and as JSON: three views of the same rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .rows import Comparison, Explanation, Row

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = (
    "parameter", "count", "shape", "role", "unit", "blocks", "m bytes", "v bytes", "all blocks", "all bytes",
    "decay", "why",
)  # fmt: skip
_DIFF_HEADER = (
    "parameter", "count", "shape", "role", "unit", "new unit", "blocks", "new blocks", "change", "all change",
)  # fmt: skip
_NUMBERS = {"count", "blocks", "new blocks", "m bytes", "v bytes", "all blocks", "all bytes", "change", "all change"}
_SPARE = ("m bytes", "v bytes", "all blocks", "change", "decay", "why", "shape", "role", "count")
"""What a narrow terminal does without, in this order; the closing lines say so."""
_FOLDED_WHY = 26  # characters in which a reason can still be read


def explanation_text(found: Explanation) -> str:
    """The table as plain text, whatever the width."""
    return "\n".join([_title(found), *_aligned(_HEADER, _cells(found)), "", *_summary(found)])


def explanation_table(found: Explanation, width: int) -> tuple[str, Table, list[str]]:
    """(title, table of rich's that fits ``width`` characters, closing lines)."""
    table, note = _rich(_HEADER, _cells(found), width)
    return _title(found), table, _summary(found) + note


def explanation_json(found: Explanation) -> dict[str, Any]:
    """The whole explanation, one entry per row, as one JSON document."""
    totals = found.totals
    return {
        "rules": {key: value for key, value in found.rules.to_dict().items() if key != "evidence"},
        "parameters": [_entry(row) for row in found.rows],
        "totals": {**dataclasses.asdict(totals), "state_bytes": totals.state_bytes},
    }


def comparison_text(found: Comparison) -> str:
    """The parameters whose layouts differ, as plain text."""
    rows = _aligned(_DIFF_HEADER, _diff_cells(found)) if found.changes else []
    return "\n".join([_diff_title(found), *rows, *_diff_summary(found)])


def comparison_table(found: Comparison, width: int) -> tuple[str, Table, list[str]]:
    """(title, table of rich's, closing lines)."""
    table, note = _rich(_DIFF_HEADER, _diff_cells(found), width)
    return _diff_title(found), table, _diff_summary(found) + note


def comparison_json(found: Comparison) -> dict[str, Any]:
    """The comparison as one JSON document."""
    return {
        "rules": [found.left.name, found.right.name],
        "differences": [dataclasses.asdict(difference) for difference in found.left.diff(found.right)],
        "parameters": [
            {"name": change.left.name, "left": _entry(change.left), "right": _entry(change.right),
             "bytes_change": change.bytes_change}
            for change in found.changes
        ],
    }  # fmt: skip


def _title(found: Explanation) -> str:
    own = [f"{override.pattern} -> {override.unit.value}" for override in found.rules.overrides]
    return f"rules: {found.rules.name}" + (f" (overrides: {', '.join(own)})" if own else "")


def _cells(found: Explanation) -> list[tuple[str, ...]]:
    return [
        (
            ("" if row.recognised else "! ") + row.name, f"{row.count:,}", _shape(row), _roles(row),
            "+".join(row.units),
            f"{row.n_blocks:,}", f"{row.exp_avg_bytes:,}", f"{row.exp_avg_sq_bytes:,}",
            f"{row.count * row.n_blocks:,}", f"{row.count * row.state_bytes:,}",
            "frozen" if not row.trainable else "yes" if row.decays else "no", row.why,
        )
        for row in found.rows
    ]  # fmt: skip


def _summary(found: Explanation) -> list[str]:
    """The last lines: how many scalars, how many bytes, against AdamW."""
    sums = found.totals
    saved = sums.adamw_bytes - sums.state_bytes
    out = [
        f"{sums.parameters:,} parameters, {sums.elements:,} elements, {sums.blocks:,} second-moment scalars "
        f"({100 * sums.blocks / max(sums.elements, 1):.3f} % of AdamW's)",
        f"state: {sums.state_bytes:,} bytes (m {sums.exp_avg_bytes:,}, v {sums.exp_avg_sq_bytes:,}) against AdamW's "
        f"{sums.adamw_bytes:,}: {saved:,} saved ({100 * saved / max(sums.adamw_bytes, 1):.1f} %)",
    ]
    if sums.frozen:
        out.append(f"{sums.frozen:,} frozen parameters, {sums.frozen_elements:,} elements: no state")
    if sums.unrecognised:
        out.append(
            f"! {sums.unrecognised:,} weight(s) not recognised: declare the family in optimizer/partition/families/, "
            "or give them a unit by name with Rules.override"
        )
    return out


def _diff_title(found: Comparison) -> str:
    return f"rules: {found.left.name} -> {found.right.name}"


def _diff_cells(found: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            left.name, f"{left.count:,}", _shape(left), _roles(left), "+".join(left.units), "+".join(right.units),
            f"{left.n_blocks:,}", f"{right.n_blocks:,}", f"{change.bytes_change:+,}",
            f"{left.count * change.bytes_change:+,}",
        )
        for change in found.changes
        for left, right in ((change.left, change.right),)
    ]  # fmt: skip


def _diff_summary(found: Comparison) -> list[str]:
    if not found.changes:
        return ["no parameter's layout differs"]
    count = sum(change.left.count for change in found.changes)
    blocks = [
        sum(row.count * row.n_blocks for row in rows)
        for rows in zip(*((c.left, c.right) for c in found.changes), strict=True)
    ]
    change = sum(change.left.count * change.bytes_change for change in found.changes)
    return ["", f"{count:,} parameters differ: {blocks[0]:,} -> {blocks[1]:,} scalars, {change:+,} bytes of state"]


def _entry(row: Row) -> dict[str, Any]:
    """A row as JSON-able values; the numbers are of one parameter."""
    return {
        "name": row.name, "count": row.count, "shape": list(row.shape), "dtype": row.dtype,
        "roles": [role.value for role in row.roles], "units": list(row.units), "blocks": row.n_blocks,
        "axis": row.layout.axis, "leading": list(row.layout.leading),
        "runs": {"segments": [list(pair) for pair in row.layout.runs.segments], "repeat": row.layout.runs.repeat},
        "exp_avg_bytes": row.exp_avg_bytes, "exp_avg_sq_bytes": row.exp_avg_sq_bytes, "adamw_bytes": row.adamw_bytes,
        "weight_decay": row.decays, "trainable": row.trainable, "recognised": row.recognised,
        "override": row.override, "why": row.why,
    }  # fmt: skip


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _roles(row: Row) -> str:
    return "+".join(role.value for role in row.roles)


def _aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal column widths, numbers to the right, the last column free."""
    lines = [header, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        fitted = [
            cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
            for cell, width, title in zip(line, widths, header, strict=True)
        ]
        out.append("  ".join(fitted).rstrip())
    return out


def _rich(header: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> tuple[Table, list[str]]:
    """A table that fits ``width`` characters, and a closing line that names the columns that did not."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    needed = {title: max(len(line[i]) for line in (header, *cells)) + 2 for i, title in enumerate(header)}
    if "why" in needed:
        needed["why"] = min(needed["why"], _FOLDED_WHY)
    left_out: list[str] = []
    for title in _SPARE:
        if sum(needed.values()) + 2 > width and needed.pop(title, 0):
            left_out.append(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in needed:
        right = title in _NUMBERS
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for line in cells:
        shown = [cell for title, cell in zip(header, line, strict=True) if title in needed]
        # Text, because "[Q|K|V]" is not meant as markup
        table.add_row(*map(Text, shown), style="bold red" if line[0].startswith("! ") else "")
    return table, [f"left out for want of width: {', '.join(left_out)} (--json has all)"] if left_out else []
