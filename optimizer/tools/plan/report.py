"""Render a plan as a text table and as a JSON-able document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .activations import Activations
from .memory import Plan, Row

GIB = 1 << 30
_SHARDING = {"ddp": "DDP (replicated)", "fsdp": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
SCHEMA_VERSION = 1


def gib(size: int) -> str:
    """Write bytes as GiB with three decimals; a positive size that rounds to zero is written as <0.001."""
    text = f"{size / GIB:,.3f}"
    return "<0.001" if text == "0.000" and size else text


def saving(row: Row, baseline: Row) -> tuple[int, float]:
    """Return (bytes, percent) by which a row's resident total is smaller than a baseline's."""
    saved = baseline.resident - row.resident
    return saved, 100 * saved / max(1, baseline.resident)


def _baselines(plan: Plan) -> list[Row]:
    """Return the rows of AdamW with states in the parameters' dtype and in fp32, or one row if these are equal."""
    first, second = plan.rows[:2]
    return [first] if first.optimizer == second.optimizer else [first, second]


def _rows(plan: Plan) -> list[Row]:
    """Return all rows, without the second row of AdamW if it is equal to the first."""
    return [*_baselines(plan), *plan.rows[2:]]


def text(plan: Plan, name: str, activations: Activations | None = None) -> str:
    """Render a plan as a text table.

    Args:
        plan: the plan.
        name: name of the model.
        activations: estimate of the activations to print below the table; None for no estimate.

    Returns:
        Plain text, sizes in GiB (2**30 bytes) per rank.
    """
    setup, rows, baselines = plan.setup, _rows(plan), _baselines(plan)
    header = [
        "optimizer",
        "parameters",
        "gradients",
        *(["master"] if setup.master else []),
        "exp_avg",
        "exp_avg_sq",
        "scales",
        "step",
        "resident",
        "temporary",
        "peak",
    ]
    header += [f"saved vs {row.optimizer.replace('AdamW, ', '').replace(' states', '')}" for row in baselines]
    header += ["scalars"]
    lines = [header]
    for row in rows:
        state = row.state
        sizes = [
            row.parameters,
            row.gradients,
            *([row.master] if setup.master else []),
            state.exp_avg,
            state.exp_avg_sq,
            state.scales,
            state.step,
            row.resident,
            state.temporary,
            row.peak,
        ]
        cells = [row.optimizer, *map(gib, sizes)]
        for baseline in baselines:
            saved, percent = saving(row, baseline)
            cells.append("-" if row is baseline else f"{saved / GIB:,.3f} ({percent:.1f} %)")
        lines.append([*cells, f"{row.n_blocks:,}"])
    ranks = f"{setup.world} rank{'s' if setup.world > 1 else ''}"
    how = f", {_SHARDING[setup.sharding]} over {setup.data_parallel}" if setup.data_parallel > 1 else ""
    how += f", tensor parallel over {setup.tp}" if setup.tp > 1 else ""
    frozen = f", {plan.trainable:,} trainable" if plan.trainable != plan.elements else ""
    out = [f"{name}: {plan.elements:,} parameters{frozen}; {ranks}{how}; GiB per rank, on the rank that needs most", ""]
    out += _aligned(lines)
    if activations is not None:
        stored, selective = gib(activations.stored), gib(activations.selective)
        out += ["", f"activations, an estimate: {stored} GiB, {selective} GiB with the attention core recomputed"]
        out += [f"  ({activations.source})"]
    out += ["", *(f"- {note}" for note in plan.notes)]
    if plan.unrecognised:
        some = ", ".join(plan.unrecognised[:3]) + (", ..." if len(plan.unrecognised) > 3 else "")
        out.append(
            f"! {len(plan.unrecognised)} weights were not recognised and get the unit of OTHER ({some}); "
            "their exp_avg_sq and scalars are not the paper's"
        )
    return "\n".join(out)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns, the first aligned to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def document(plan: Plan, name: str, activations: Activations | None = None) -> dict[str, Any]:
    """Return the plan as JSON-able data. Every size is in bytes per rank."""
    baselines = _baselines(plan)
    rows = []
    for row in _rows(plan):
        saved = {base.optimizer: dict(zip(("bytes", "percent"), saving(row, base), strict=True)) for base in baselines}
        rows.append({**asdict(row), "resident": row.resident, "peak": row.peak, "saved": saved})
    return {
        "schema_version": SCHEMA_VERSION,
        "target": name,
        "setup": asdict(plan.setup),
        "elements": plan.elements,
        "trainable": plan.trainable,
        "rows": rows,
        "activations_estimate": asdict(activations) if activations else None,
        "unrecognised": list(plan.unrecognised),
        "notes": list(plan.notes),
    }
