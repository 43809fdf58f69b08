"""Read shipped rule sets: the unit of every role, and the evidence from which a set was derived."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.documents import damaged, read_object

_MEND = "restore it from the repository"
_COLUMNS = ("unit", "blocks_per_parameter", "z", "lift", "jensen", "jensen_null", "n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the rule sets of a folder: name -> content of the file.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a file is damaged or no rule set.
    """
    found = {path.stem: read_object(path, _MEND) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"no rule sets in {folder}; give the folder optimizer/partition/rules of a checkout")
    for name, document in found.items():
        for key, kind in (("units", dict), ("description", str)):
            if not isinstance(document.get(key), kind):
                raise damaged(folder / f"{name}.json", f"it has no {key}", _MEND)
    return found


def candidates(document: dict[str, Any]) -> pd.DataFrame:
    """Return the candidates of rules that Hessians chose: one row per role and candidate; empty for other rules.

    Columns: role, unit, blocks_per_parameter, z, lift, jensen, jensen_null, n, ``chosen`` and ``why``.
    """
    rows = [
        {
            "role": role,
            **{key: row[key] for key in _COLUMNS},
            "chosen": row["unit"] == choice["unit"],
            "why": choice["why"],
        }
        for role, choice, row in _candidates(document)
        if "jensen" in row
    ]
    return pd.DataFrame(rows, columns=["role", *_COLUMNS, "chosen", "why"])


def trained(document: dict[str, Any]) -> pd.DataFrame:
    """Return the candidates of rules that training runs chose: one row per role and candidate; empty for other rules.

    Columns: role, unit, scalars, ``gaps`` (pair of model and corpus -> nats), ``worst`` (the largest gap) and
    ``chosen``.
    """
    keys = ("unit", "scalars", "gaps", "worst")
    rows = [
        {"role": role, **{key: row[key] for key in keys}, "chosen": row["unit"] == choice["unit"]}
        for role, choice, row in _candidates(document)
        if "gaps" in row
    ]
    return pd.DataFrame(rows, columns=["role", *keys, "chosen"])


def _candidates(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (role, its choice, a candidate) of a rule set."""
    for role, choice in (document.get("evidence") or {}).get("choices", {}).items():
        for row in choice.get("candidates", []):
            yield role, choice, row
