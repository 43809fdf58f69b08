"""Write the results of the sweep as a page of the documentation and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(rows: list[dict[str, Any]], page: Path, data: Path | None) -> None:
    """Write the page and, if ``data`` is a path, the JSON file; each of them atomically."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    for path, text in (
        (data, json.dumps({**versions, "classes": rows}, indent=1) + "\n"),
        (page, _page(rows, versions)),
    ):
        if path is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def status(row: dict[str, Any]) -> str:
    """Return the status of a class, one of the keys of ``_MEANING``."""
    if "not_built" in row:
        return "not built"
    if row.get("error"):
        return "refused"
    if row.get("unknown"):
        return "named unknown"
    if row.get("contradicted"):
        return "contradicted"
    if "has no query, key or value projection" in row.get("verify", ""):
        return "no attention"
    if row.get("proven") and not row.get("undecided"):
        return "proven"
    return "partly proven" if row.get("proven") else "by table"


_MEANING = {
    "proven": "every weight recognised, and every query, key and value projection proven from gradients",
    "partly proven": "every weight recognised; some projections proven, none contradicted, some undecided",
    "by table": "every weight recognised; no projection decided by gradients",
    "no attention": "every weight recognised; there are no queries, keys or values to prove",
    "named unknown": "weights that are not recognised, named below; they get the unit of OTHER, with a warning",
    "contradicted": "gradients contradict the table",
    "refused": "the partition raises an error",
    "not built": "the class does not build from its default configuration here, nor from a small one",
}


def _page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    built = [row for row in rows if "not_built" not in row]
    counts = {word: sum(status(row) == word for row in rows) for word in _MEANING}
    clean = sum(counts[word] for word in ("proven", "partly proven", "by table", "no attention"))
    lines = [
        "# Coverage of transformers",
        "",
        f"Written by `make coverage` with transformers {versions['transformers']} and torch {versions['torch']}. The "
        "classes are all `*ForCausalLM`, `*ForMaskedLM`, `*ForConditionalGeneration` and `*ForImageClassification`. "
        "Each is built in its default configuration on the meta device, where every weight must be recognised, and as "
        "a small instance with every width divided by one number, whose gradients prove the layouts.",
        "",
        f"{len(rows)} classes, {len(built)} build; {clean} of those ({100 * clean / max(1, len(built)):.1f} %) without "
        f"an unrecognised weight of two or more dimensions; {counts['contradicted']} contradicted by gradients.",
        "",
        "| status | classes | meaning |",
        "|---|---|---|",
        *(f"| {word} | {counts[word]} | {meaning} |" for word, meaning in _MEANING.items()),
        "",
        "| class | status | weights | proven | undecided | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        remarks = row.get("unknown") or row.get("contradicted") or row.get("undecided_names") or []
        why = row.get("not_built") or row.get("error") or row.get("verify") or row.get("not_small") or ""
        why = "" if status(row) == "no attention" else why
        text = "; ".join([*([why] if why else []), *(str(r) for r in remarks[:3])]).replace("|", "\\|")
        more = f" (+{len(remarks) - 3})" if len(remarks) > 3 else ""
        lines.append(
            f"| {row['class']} | {status(row)} | {row.get('weights', '')} | {row.get('proven', '')} | "
            f"{row.get('undecided', '')} | {text}{more} |"
        )
    return "\n".join(lines) + "\n"
