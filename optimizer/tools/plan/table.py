"""Write the memory of the shipped architectures as Markdown, next to the numbers of the paper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..architectures import facts, shipped
from ..targets import load_target
from .memory import Plan, make_plan
from .model import parameters_of
from .sharding import Parameter, Setup

GB = 10**9
_RULES = ("adam_mini", "short_run", "slim_adam", "pytorch_default", "derived_blocks", "derived", "factored")
_MOMENTS = ("fp32", "bf16", "int8", "int4")
_HEADER = (
    "model",
    "parameters",
    "AdamW m+v",
    "Adam-mini m+v",
    "saved",
    "paper: AdamW",
    "paper: Adam-mini",
    "scalars",
    "share of AdamW's",
)
_INTRO = """# Memory of the optimizer's state

Written by `python -m optimizer plan --table docs/memory.md` from the architectures in `optimizer/tools/configs`,
without weights. GB are 10^9 bytes, as in the paper. `m+v` is exp_avg and exp_avg_sq, both in fp32, on one device;
Adam-mini's v is counted as this package stores it, aligned with the layout's axis (a head's scalar once per row), so
the column is the memory that the two moments need. Scalars are the distinct second-moment scalars, and their share of
AdamW's.

## fp32, rules `adam_mini`
"""
_PAPER = """
The paper's numbers (Zhang et al., arXiv 2406.16793) are quoted for {quoted} and recalled, not looked up, for the other
rows. They are 8 and 4 bytes times a rounded number of parameters (1.56 billion for GPT-2 1.5B), without Adam-mini's v.
The largest difference between them and this table is {difference:.2f} % for AdamW and {mini:.2f} % for Adam-mini.
"""
_RULE_SETS = """
## Second moment by rule set

Bytes of v as stored, in MB (10^6 bytes), and scalars. A head's scalar is stored once per row, so sets that share more
scalars do not always store less.
"""
_LOW_BITS = """
## Whole state in low precision

State in GB with parameters in bf16, on one device: AdamW with fp32, bf16 (as torch keeps it) and 8-bit states
(blockwise 256, torchao's storage); Adam-mini with its first moment in fp32, bf16, int8 and int4
(`exp_avg_dtype`, scales included). Adam-mini's second moment is always fp32.
"""


def write(path: str | os.PathLike[str]) -> Path:
    """Write the document to a file, which is replaced in one step, and return its path.

    Raises:
        ValueError: the folder of ``path`` does not exist.
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
    """Return the document for some of the shipped architectures; for all of them if ``names`` is None."""
    models = {name: parameters_of(load_target(name)) for name in names or shipped()}
    plans = {name: make_plan(parameters, Setup(dtype="fp32"), _RULES) for name, parameters in models.items()}
    lines = [_INTRO, *_table(_HEADER, [first_row(name, plan) for name, plan in plans.items()])]
    lines += [_paper(plans)]
    lines += [
        _RULE_SETS.lstrip("\n"),
        *_table(
            ("model", *(f"`{rules}`" for rules in _RULES)), [_by_rules(name, plan) for name, plan in plans.items()]
        ),
    ]
    lines += [
        _LOW_BITS,
        *_table(
            ("model", "AdamW fp32", "AdamW bf16", "AdamW 8-bit", *(f"Adam-mini {dtype}" for dtype in _MOMENTS)),
            [_low_bits(*item) for item in models.items()],
        ),
    ]
    unknown = [(facts(name)["title"], plan.unrecognised) for name, plan in plans.items() if plan.unrecognised]
    if unknown:
        lines += ["", "Weights whose role is not known, which get one scalar per tensor and not the paper's:", ""]
        lines += [f"- {title}: {len(which)}, for example `{which[-1]}`" for title, which in unknown]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, the first column aligned to the left and the others to the right."""
    rule = "|" + "|".join([":--", *["--:"] * (len(header) - 1)]) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _moments(plan: Plan, optimizer: str) -> int:
    """Return the bytes of both moments of an optimizer."""
    state = plan.row(optimizer).state
    return state.exp_avg + state.exp_avg_sq


def first_row(name: str, plan: Plan) -> list[str]:
    """Return the cells of an architecture in the first table.

    Args:
        name: name of a shipped architecture.
        plan: plan of the architecture in fp32 on one device.
    """
    architecture = facts(name)
    adamw, mini = (_moments(plan, row) for row in ("AdamW, fp32 states", "Adam-mini, adam_mini"))
    blocks = plan.row("Adam-mini, adam_mini").n_blocks
    reported: dict[str, Any] = architecture.get("paper_gb") or {}
    paper = [f"{reported[key]:.2f}" if reported else "" for key in ("adamw", "adam_mini")]
    return [
        architecture["title"],
        f"{plan.elements:,}",
        f"{adamw / GB:,.2f}",
        f"{mini / GB:,.2f}",
        f"{100 * (1 - mini / adamw):.2f} %",
        *paper,
        f"{blocks:,}",
        f"{100 * blocks / plan.elements:.4f} %",
    ]


def _paper(plans: dict[str, Plan]) -> str:
    """Describe the largest differences between the plans and the paper's table."""
    differences: dict[str, list[float]] = {"adamw": [0.0], "adam_mini": [0.0]}
    quoted = []
    for name, plan in plans.items():
        reported = facts(name).get("paper_gb")
        if not reported:
            continue
        if reported["status"] == "quoted":
            quoted.append(facts(name)["title"])
        for key, row in (("adamw", "AdamW, fp32 states"), ("adam_mini", "Adam-mini, adam_mini")):
            differences[key].append(100 * abs(_moments(plan, row) / GB / reported[key] - 1))
    return _PAPER.format(
        quoted=", ".join(quoted) or "none", difference=max(differences["adamw"]), mini=max(differences["adam_mini"])
    )


def _by_rules(name: str, plan: Plan) -> list[str]:
    """Return the cells of an architecture in the table of rule sets."""
    rows = [plan.row(f"Adam-mini, {rules}") for rules in _RULES]
    return [facts(name)["title"], *(f"{row.state.exp_avg_sq / 1e6:,.2f} MB, {row.n_blocks:,}" for row in rows)]


def _low_bits(name: str, parameters: list[Parameter]) -> list[str]:
    """Return the cells of an architecture in the table of low precision."""
    plan = make_plan(parameters, Setup(dtype="bf16"), ())
    sizes = [plan.rows[i].state.total for i in (1, 0, 2)]
    for dtype in _MOMENTS:
        mini = make_plan(parameters, Setup(dtype="bf16", exp_avg_dtype=dtype), ("adam_mini",))
        sizes.append(mini.row("Adam-mini, adam_mini").state.total)
    return [facts(name)["title"], *(f"{size / GB:,.2f}" for size in sizes)]
