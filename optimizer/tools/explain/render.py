"""Render explanations and comparisons as plain text, as a ``rich`` table, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...partition.factored import FactoredLayout
from .rows import Comparison, Explanation, Row

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = (
    "parameter",
    "count",
    "shape",
    "role",
    "unit",
    "blocks",
    "m bytes",
    "v bytes",
    "all blocks",
    "all bytes",
    "decay",
    "why",
)
_DIFF_HEADER = (
    "parameter",
    "count",
    "shape",
    "role",
    "unit",
    "new unit",
    "blocks",
    "new blocks",
    "change",
    "all change",
)
_NUMBERS = {"count", "blocks", "new blocks", "m bytes", "v bytes", "all blocks", "all bytes", "change", "all change"}
_SPARE = ("m bytes", "v bytes", "all blocks", "change", "decay", "why", "shape", "role", "count")
"""Columns that are left out on a narrow terminal, in this order. The closing lines name those that were left out."""
_FOLDED_WHY = 26  # width in characters to which the column of reasons may shrink and stay readable


def explanation_text(explanation: Explanation) -> str:
    """Return the explanation as plain text with all columns, however wide it is."""
    return "\n".join([_title(explanation), *_aligned(_HEADER, _cells(explanation)), "", *_summary(explanation)])


def explanation_table(explanation: Explanation, width: int) -> tuple[str, Table, list[str]]:
    """Return (title, ``rich`` table that fits ``width`` characters, closing lines)."""
    table, note = _rich(_HEADER, _cells(explanation), width)
    return _title(explanation), table, _summary(explanation) + note


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """Return the explanation as one JSON-able document with one entry per row."""
    totals = explanation.totals
    return {
        "rules": {key: value for key, value in explanation.rules.to_dict().items() if key != "evidence"},
        "parameters": [_entry(row) for row in explanation.rows],
        "totals": {**dataclasses.asdict(totals), "state_bytes": totals.state_bytes},
    }


def comparison_text(comparison: Comparison) -> str:
    """Return the parameters whose layouts differ as plain text."""
    rows = _aligned(_DIFF_HEADER, _diff_cells(comparison)) if comparison.changes else []
    return "\n".join([_diff_title(comparison), *rows, *_diff_summary(comparison)])


def comparison_table(comparison: Comparison, width: int) -> tuple[str, Table, list[str]]:
    """Return (title, ``rich`` table that fits ``width`` characters, closing lines)."""
    table, note = _rich(_DIFF_HEADER, _diff_cells(comparison), width)
    return _diff_title(comparison), table, _diff_summary(comparison) + note


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as one JSON-able document."""
    return {
        "rules": [comparison.left.name, comparison.right.name],
        "differences": [dataclasses.asdict(difference) for difference in comparison.left.diff(comparison.right)],
        "parameters": [
            {
                "name": change.left.name,
                "left": _entry(change.left),
                "right": _entry(change.right),
                "bytes_change": change.bytes_change,
            }
            for change in comparison.changes
        ],
    }


def _title(explanation: Explanation) -> str:
    overrides = [f"{override.pattern} -> {override.unit.value}" for override in explanation.rules.overrides]
    return f"rules: {explanation.rules.name}" + (f" (overrides: {', '.join(overrides)})" if overrides else "")


def _cells(explanation: Explanation) -> list[tuple[str, ...]]:
    return [
        (
            ("" if row.recognised else "! ") + row.name,
            f"{row.count:,}",
            _shape(row),
            _roles(row),
            "+".join(row.units),
            f"{row.n_blocks:,}",
            f"{row.exp_avg_bytes:,}",
            f"{row.exp_avg_sq_bytes:,}",
            f"{row.count * row.n_blocks:,}",
            f"{row.count * row.state_bytes:,}",
            "frozen" if not row.trainable else "yes" if row.decays else "no",
            row.why,
        )
        for row in explanation.rows
    ]


def _summary(explanation: Explanation) -> list[str]:
    """Return the last lines: numbers of scalars and bytes, and a comparison with AdamW."""
    sums = explanation.totals
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


def _diff_title(comparison: Comparison) -> str:
    return f"rules: {comparison.left.name} -> {comparison.right.name}"


def _diff_cells(comparison: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            left.name,
            f"{left.count:,}",
            _shape(left),
            _roles(left),
            "+".join(left.units),
            "+".join(right.units),
            f"{left.n_blocks:,}",
            f"{right.n_blocks:,}",
            f"{change.bytes_change:+,}",
            f"{left.count * change.bytes_change:+,}",
        )
        for change in comparison.changes
        for left, right in ((change.left, change.right),)
    ]


def _diff_summary(comparison: Comparison) -> list[str]:
    if not comparison.changes:
        return ["no parameter's layout differs"]
    count = sum(change.left.count for change in comparison.changes)
    blocks = [
        sum(row.count * row.n_blocks for row in rows)
        for rows in zip(*((c.left, c.right) for c in comparison.changes), strict=True)
    ]
    change = sum(change.left.count * change.bytes_change for change in comparison.changes)
    return ["", f"{count:,} parameters differ: {blocks[0]:,} -> {blocks[1]:,} scalars, {change:+,} bytes of state"]


def _entry(row: Row) -> dict[str, Any]:
    """Return a row as JSON-able values. The numbers are those of one parameter."""
    layout, factored = row.layout, None
    rows = layout.rows if isinstance(layout, FactoredLayout) else layout
    if isinstance(layout, FactoredLayout):
        segments = [list(pair) for pair in layout.segments]
        factored = {"segments": segments, "repeat": layout.repeat, "parts": layout.parts, "columns": layout.columns}
    return {
        "name": row.name,
        "count": row.count,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "roles": [role.value for role in row.roles],
        "units": list(row.units),
        "blocks": row.n_blocks,
        "axis": rows.axis,
        "leading": list(rows.leading),
        "runs": {"segments": [list(pair) for pair in rows.runs.segments], "repeat": rows.runs.repeat},
        "factored": factored,
        "exp_avg_bytes": row.exp_avg_bytes,
        "exp_avg_sq_bytes": row.exp_avg_sq_bytes,
        "adamw_bytes": row.adamw_bytes,
        "weight_decay": row.decays,
        "trainable": row.trainable,
        "recognised": row.recognised,
        "override": row.override,
        "why": row.why,
    }


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _roles(row: Row) -> str:
    return "+".join(role.value for role in row.roles)


def _aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns. Numbers are aligned to the right, the last column has no padding."""
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
    """Return a table that fits ``width`` characters, and a line that names the columns left out, if any."""
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
        # Text, because rich would read "[Q|K|V]" as markup.
        table.add_row(*map(Text, shown), style="bold red" if line[0].startswith("! ") else "")
    return table, [f"left out to fit the width: {', '.join(left_out)} (--json has all)"] if left_out else []
