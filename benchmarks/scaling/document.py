"""Compute the tables of docs/scaling.md and their JSON document."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.scaling.simulate import Message, fsdp2, zero3, zero12
from benchmarks.scaling.traffic import SUM, all_reduced, gradients
from benchmarks.scaling.weights import Weight, weights_of
from optimizer.tools.architectures import facts
from optimizer.tools.targets import load_target

MODELS = ("llama-3-8b", "llama-3-70b", "llama-3-405b")
WORLDS = tuple(2**k for k in range(3, 13))
TP = 8
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
RULES, RULES_RANKS = (
    ("adam_mini", "short_run", "pytorch_default", "slim_adam", "derived_blocks", "derived", "factored"),
    64,
)
_STYLES = {"fsdp2": "FSDP2", "tp8-fsdp2": "TP 8 x FSDP2", "zero3": "ZeRO-3", "zero12": "ZeRO-1, ZeRO-2"}


def _messages(style: str, weights: list[Weight], ranks: int) -> list[Message]:
    if style == "tp8-fsdp2":
        return fsdp2(weights, ranks // TP, TP)
    return {"fsdp2": fsdp2, "zero3": zero3, "zero12": zero12}[style](weights, ranks)


def row(style: str, weights: list[Weight], ranks: int) -> dict[str, Any]:
    """Return the traffic of one way to shard a model over a number of ranks, for the rank that sends the most."""
    messages = _messages(style, weights, ranks)
    tp = TP if style == "tp8-fsdp2" else 1
    gradient_bytes = gradients(weights, ranks // tp, tp, gathers=1 if style == "zero12" else 2)
    wire = all_reduced(messages)
    return {
        "ranks": ranks,
        "style": style,
        "messages": [
            {
                "ranks": m.ranks,
                "along": m.along,
                "bytes": m.numbers * SUM,
                "tensors": m.tensors,
                "blocks": dict(sorted(m.blocks.items())),
            }
            for m in messages
        ],
        "bytes": sum(m.numbers * SUM for m in messages),
        "wire_bytes": wire,
        "gradient_wire_bytes": gradient_bytes,
        "ratio": wire / gradient_bytes if gradient_bytes else None,
    }


def by_rules(model: str = MODELS[0], ranks: int = RULES_RANKS) -> dict[str, list[dict[str, Any]]]:
    """Return a model's rows under several rule sets."""
    target = load_target(model)
    return {rules: [row(style, weights_of(target, rules), ranks) for style in _STYLES] for rules in RULES}


def compute(models: tuple[str, ...] = MODELS, worlds: tuple[int, ...] = WORLDS) -> dict[str, Any]:
    """Return all rows of all models."""
    out = {}
    for name in models:
        weights = weights_of(load_target(name))
        out[name] = {
            "title": facts(name)["title"],
            "tensors": len(weights),
            "blocks": sum(w.layout.n_blocks for w in weights),
            "rows": [row(style, weights, ranks) for ranks in worlds for style in _STYLES],
        }
    return out


def tables(models: dict[str, Any], rules: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown tables.

    There is a table for each model, one of the roles whose blocks are cut in the last model, and one of the first model
    under other rules.
    """
    out = []
    for document in models.values():
        rows = {(r["style"], r["ranks"]): r for r in document["rows"]}
        worlds = sorted({ranks for _, ranks in rows})
        out += [f"### {document['title']}: {document['blocks']:,} blocks in {document['tensors']:,} tensors", ""]
        cells = [[f"{ranks:,}", *(_cell(rows[style, ranks]) for style in _STYLES)] for ranks in worlds]
        out += _table(["ranks", *_STYLES.values()], cells)
        out += [""]
    document = list(models.values())[-1]
    out += [f"### Whose blocks: {document['title']}", ""]
    out += _table(
        ["ranks", *_STYLES.values()],
        [
            [f"{ranks:,}", *(_roles(r) for r in document["rows"] if r["ranks"] == ranks)]
            for ranks in sorted({r["ranks"] for r in document["rows"]})[::3]
        ],
    )
    first, ranks = next(iter(models.values())), next(iter(rules.values()))[0]["ranks"]
    out += ["", f"### Other rules: {first['title']} on {ranks} ranks", ""]
    out += _table(["rules", *_STYLES.values()], [[f"`{name}`", *map(_cell, rows)] for name, rows in rules.items()])
    return "\n".join(out) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = "|" + "|".join(["--:", *[":--"] * (len(header) - 1)]) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _cell(row: dict[str, Any]) -> str:
    messages = row["messages"]
    if not messages:
        return "nothing"
    if row["style"] == "tp8-fsdp2":
        sizes = " + ".join(f"{_size(m['bytes'])} {m['along']}" for m in messages)
    elif len(messages) == 1:
        sizes = _size(messages[0]["bytes"])
    else:
        sizes = f"{len(messages)} messages, {_size(row['bytes'])}"
    ratio = f"{row['ratio']:.0e}" if row["ratio"] else "no gradients sent"
    return f"{sizes} ({ratio})"


def _roles(row: dict[str, Any]) -> str:
    blocks: Counter[str] = Counter()
    for message in row["messages"]:
        blocks.update(message["blocks"])
    words = (f"{role.lower().replace('_', ' ')} {count:,}" for role, count in blocks.most_common() if count)
    return ", ".join(words) or "none"


def _size(nbytes: int) -> str:
    if nbytes >= 999.5 * 2**10:
        return f"{nbytes / 2**20:.3g} MiB"
    return f"{nbytes / 2**10:.3g} KiB" if nbytes >= 2**10 else f"{nbytes} B"


def merged(page: str, new: str) -> str:
    """Return the page with new tables between its two marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}; put the two lines where the tables belong")
    return f"{before}{BEGIN}\n\n{new}\n{END}{after}"
