"""The shipped architectures' memory as Markdown, beside the numbers the paper gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .memory import Plan, make_plan
from .model import Target, load_target, parameters_of, shipped
from .sharding import Setup

GB = 10**9
_RULES = ("adam_mini", "short_run", "slim_adam", "pytorch_default")
_HEADER = ("model", "parameters", "AdamW m+v", "Adam-mini m+v", "saved", "paper: AdamW", "paper: Adam-mini",
           "scalars", "share of AdamW's")  # fmt: skip
_INTRO = """# Memory of the optimizer's state

Written by `python -m optimizer plan --table docs/memory.md` from the architectures in `optimizer/tools/plan/configs`,
without weights. GB are 10^9 bytes, as in the paper. `m+v` is exp_avg and exp_avg_sq, both in fp32, on one device;
Adam-mini's v is counted as this package stores it, aligned with the layout's axis (a head's scalar once per row), so
the column is what a training run holds. Scalars are the second-moment scalars that differ, and their share of AdamW's.

## fp32, rules `adam_mini`
"""
_PAPER = """
The paper's numbers (Zhang et al., arXiv 2406.16793) are quoted for {quoted} and recalled, not looked up, for the other
rows. They are 8 and 4 bytes times a rounded number of parameters (1.56 billion for GPT-2 1.5B), Adam-mini's v not
counted; the largest difference to ours is {difference:.2f} % for AdamW and {mini:.2f} % for Adam-mini.
"""
_RULE_SETS = """
## Second moment by rule set

Bytes of v as stored, in MB (10^6 bytes), and scalars. A head's scalar is stored once per row, so sets that share more
scalars do not always store less.
"""
_LOW_BITS = """
## Whole state in low precision

State in GB with parameters in bf16, on one device: AdamW with fp32, bf16 (as torch keeps it) and 8-bit states
(blockwise 256, torchao's storage), Adam-mini with its first moment in fp32, bf16 and 8 bits (stored
likewise), its second moment always in fp32. This is arithmetic on storage, whichever of these an optimizer offers.
"""


def write(path: str | os.PathLike[str]) -> Path:
    """Write the table; the file appears whole or not at all.

    Raises:
        ImportError: transformers is not installed.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"--table {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(markdown(), encoding="utf-8")
    os.replace(temporary, path)
    return path


def markdown(names: list[str] | None = None) -> str:
    """The document, of all shipped architectures or of some."""
    targets = [load_target(name) for name in names or shipped()]
    plans = {t.name: make_plan(parameters_of(t.model), Setup(dtype="fp32"), _RULES) for t in targets}
    lines = [_INTRO, *_table(_HEADER, [first_row(t, plans[t.name]) for t in targets])]
    lines += [_paper(targets, plans)]
    lines += [_RULE_SETS.lstrip("\n"), *_table(("model", *(f"`{rules}`" for rules in _RULES)),
                                  [_by_rules(t, plans[t.name]) for t in targets])]  # fmt: skip
    lines += [_LOW_BITS, *_table(("model", "AdamW fp32", "AdamW bf16", "AdamW 8-bit", "Adam-mini fp32",
                                  "Adam-mini bf16", "Adam-mini 8-bit"), [_low_bits(t) for t in targets])]  # fmt: skip
    unknown = [(t.facts["title"], plans[t.name].unrecognised) for t in targets if plans[t.name].unrecognised]
    if unknown:
        lines += ["", "Weights whose role is not known, which get one scalar per tensor and not the paper's:", ""]
        lines += [f"- {title}: {len(which)}, for example `{which[-1]}`" for title, which in unknown]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Markdown lines: the first column to the left, numbers to the right."""
    rule = "|" + "|".join([":--", *["--:"] * (len(header) - 1)]) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _moments(plan: Plan, optimizer: str) -> int:
    state = plan.row(optimizer).state
    return state.exp_avg + state.exp_avg_sq


def first_row(target: Target, plan: Plan) -> list[str]:
    """One line of the first table.

    Args:
        target: a shipped architecture.
        plan: its plan in fp32 on one device.
    """
    adamw, mini = (_moments(plan, name) for name in ("AdamW, fp32 states", "Adam-mini, adam_mini"))
    blocks = plan.row("Adam-mini, adam_mini").n_blocks
    reported: dict[str, Any] = target.facts.get("paper_gb") or {}
    paper = [f"{reported[key]:.2f}" if reported else "" for key in ("adamw", "adam_mini")]
    return [target.facts["title"], f"{plan.elements:,}", f"{adamw / GB:,.2f}", f"{mini / GB:,.2f}",
            f"{100 * (1 - mini / adamw):.2f} %", *paper, f"{blocks:,}",
            f"{100 * blocks / plan.elements:.4f} %"]  # fmt: skip


def _paper(targets: list[Target], plans: dict[str, Plan]) -> str:
    """What the comparison with the paper's table comes to."""
    off: dict[str, list[float]] = {"adamw": [0.0], "adam_mini": [0.0]}
    quoted = []
    for target in targets:
        reported = target.facts.get("paper_gb")
        if not reported:
            continue
        if reported["status"] == "quoted":
            quoted.append(target.facts["title"])
        for key, name in (("adamw", "AdamW, fp32 states"), ("adam_mini", "Adam-mini, adam_mini")):
            off[key].append(100 * abs(_moments(plans[target.name], name) / GB / reported[key] - 1))
    return _PAPER.format(quoted=", ".join(quoted) or "none", difference=max(off["adamw"]), mini=max(off["adam_mini"]))


def _by_rules(target: Target, plan: Plan) -> list[str]:
    rows = [plan.row(f"Adam-mini, {rules}") for rules in _RULES]
    return [target.facts["title"], *(f"{row.state.exp_avg_sq / 1e6:,.2f} MB, {row.n_blocks:,}" for row in rows)]


def _low_bits(target: Target) -> list[str]:
    parameters = parameters_of(target.model)
    plan = make_plan(parameters, Setup(dtype="bf16"), ())
    sizes = [plan.rows[i].state.total for i in (1, 0, 2)]
    for dtype in ("fp32", "bf16", "int8"):
        mini = make_plan(parameters, Setup(dtype="bf16", exp_avg_dtype=dtype), ("adam_mini",))
        sizes.append(mini.row("Adam-mini, adam_mini").state.total)
    return [target.facts["title"], *(f"{size / GB:,.2f}" for size in sizes)]
