"""The page of ``benchmarks.sft_memory``: its tables, and the sentences that its numbers fill."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.allocations import KINDS

INTRO = """# Memory of fine-tuning: where the promised half is

Written by `python -m benchmarks.sft_memory --docs docs/sft_memory.md` from `benchmarks/results/sft_memory.json`;
without `--docs` the command measures (`.venv/workloads/bin/python`, some minutes for each optimizer).

Adam-mini halves the two moments. A training process holds more than moments. This page says what, for one step of
fine-tuning SmolLM2-135M on {rows_of_batch} x {length} tokens: fp32 weights, bf16 autocast, CPU, one thread, torch
{torch}. Gradients are freed when a step begins, so they do not add to the activations. MB are 10^6 bytes.

Every optimizer has a process of its own. **Resident** is the most memory of the process in its second step, beyond what
it had after its imports. **Allocated** is the most that torch had allocated at one time in the third step, from the
profiler. Every storage is followed from the operation that made it until it is freed, and the columns of the second
table are what lived at the peak, by kind. What no kind covers is named: *inside operations* is memory that an operation
allocates and frees before it returns (allocated minus followed), and *heap and files* is what torch did not allocate
(resident minus allocated): gaps of the heap, where freed tensors were, and mapped files.
"""
WORDS = """
Logits are all tensors of the size of the logits (bf16, fp32, their gradients). Activations are other tensors that the
backward pass needs. A bf16 copy of every weight matrix lives from the forward to the backward pass, because autocast
keeps it.
"""
PLAN_INTRO = """
## Llama 2-7B, from its architecture

`python -m optimizer plan llama-2-7b` for ZeRO-2 with bf16 weights and gradients, an fp32 copy of the weights and fp32
moments, GB (10^9 bytes) on one device. {micro_batch} sequences of {sequence} tokens per device, as in Adam-mini's
fine-tuning of this model. Layers are assumed to be recomputed in the backward pass, so that only their inputs are kept
(2sbh bytes a layer, arXiv 2205.05198). Logits are one fp32 tensor of {vocabulary:,} tokens. Neither depends on the
optimizer. `int8 moment` quantises the first moment. Nothing here was run.

"""


def mb(value: float) -> str:
    """Return bytes as MB."""
    return f"{round(value / 1e6):,}"


def gb(value: float) -> str:
    """Return bytes as GB."""
    return f"{value / 1e9:,.2f}"


def saved(value: float, baseline: float) -> str:
    """Return how much less one number is than another, in per cent."""
    return f"{100 * (1 - value / baseline):.0f} %"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose first column is text."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def moments(row: Mapping[str, Any]) -> int:
    """Return the bytes of both moments."""
    return int(row["held"]["first moment"] + row["held"]["second moment"])


def page(document: dict[str, Any]) -> str:
    """Return the page."""
    rows, plan = document["rows"], document["plan"]
    first = rows["AdamW"]
    own = {name: row["resident"] - row["baseline"] for name, row in rows.items()}
    lines = [INTRO.format(**document, torch=document["machine"]["torch"])]
    totals = []
    for name, row in rows.items():
        pairs = ((moments(row), moments(first)), (row["allocated"], first["allocated"]), (own[name], own["AdamW"]))
        totals.append([name, *[text for now, before in pairs for text in (mb(now), saved(now, before))], row["phase"]])
    lines += table(["MB", "moments", "saved", "allocated", "saved", "resident", "saved", "peak in"], totals)
    lines += ["", "What lived at the peak, in MB:", ""]
    kinds = [
        [
            name,
            *[mb(row["kinds"][kind]) for kind in KINDS],
            mb(row["allocated"] - row["followed"]),
            mb(own[name] - row["allocated"]),
            mb(own[name]),
        ]
        for name, row in rows.items()
    ]
    lines += table(["MB", *KINDS, "inside operations", "heap and files", "resident"], kinds)
    lines += [WORDS, sentence(rows)]
    lines += [PLAN_INTRO.format(**document["plan_options"]), *planned(plan), ""]
    return "\n".join(lines) + "\n"


def sentence(rows: Mapping[str, Any]) -> str:
    """Return what the saving consists of."""
    adamw, mini = rows["AdamW"], rows["adam_mini"]
    less = adamw["allocated"] - mini["allocated"]
    kinds = {kind: size / adamw["allocated"] for kind, size in adamw["kinds"].items()}
    rest = ", ".join(
        f"{kind} {100 * share:.0f} %"
        for kind, share in sorted(kinds.items(), key=lambda pair: -pair[1])
        if share > 0.005
    )
    text = (
        f"Adam-mini frees {mb(less)} MB of AdamW's {mb(adamw['allocated'])} MB: half of the moments, "
        f"{saved(mini['allocated'], adamw['allocated'])} of all that torch has allocated. AdamW's peak consists of "
        f"{rest}. Only the second moment is Adam-mini's to remove. The more tokens a step has, the smaller its share. "
        f"AdamW's peak is in the {adamw['phase']} pass, when {mb(adamw['kinds']['gradients'])} MB of gradients are "
        "there. A peak before the gradients cannot be lowered by gradient release."
    )
    return textwrap.fill(text, 120)


def planned(plan: list[dict[str, Any]]) -> list[str]:
    """Return the table of the plan."""
    columns = [key for key in plan[0] if key not in ("devices", "optimizer")]
    firsts = {
        row["devices"]: sum(row[c] for c in columns) for row in reversed(plan) if row["optimizer"].startswith("AdamW")
    }
    rows = []
    for row in plan:
        total = sum(row[column] for column in columns)
        rows.append(
            [f"{row['devices']}, {row['optimizer']}", *[gb(row[c]) for c in columns], gb(total),
             saved(total, firsts[row["devices"]])]
        )  # fmt: skip
    return table(["devices, optimizer", *columns, "sum", "saved"], rows)


def fitting(tried: Mapping[int, int], cap: int) -> int:
    """Return the largest number of rows that fits under a cap; 0 if none does.

    Args:
        tried: rows -> bytes.
        cap: bytes.
    """
    return max((rows for rows, size in tried.items() if size <= cap), default=0)


def largest_batch(document: Mapping[str, Any]) -> str:
    """Return the section on the largest batch under a cap, from what ``benchmarks.largest_batch`` stored."""
    cap = document["cap"]
    lines = ["| optimizer | largest batch | MB there | MB with one row more |", "|:--|--:|--:|--:|"]
    for name, found in document["rows"].items():
        tried = {int(rows): size for rows, size in found.items()}
        rows = fitting(tried, cap)
        here, more = (f"{tried[n] / 1e6:,.0f}" if n in tried else "–" for n in (rows, rows + 1))
        lines.append(f"| {name} | {rows} x {document['length']} tokens | {here} | {more} |")
    intro = f"""## The largest batch under a cap

The largest batch whose resident memory stays under a cap of {cap / 1e6:,.0f} MB beyond the imports. Every size is a
process of its own (`python -m benchmarks.largest_batch`)."""
    return f"{intro}\n\n" + "\n".join(lines) + "\n"
