"""Rules: role -> unit, plus the evidence for it, as files a person can read and a program can check."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .roles import HEAD_ROLES, Role, Unit

SCHEMA_VERSION = 1
UnitMap = Mapping[Any, Any]
"""Role -> unit, each as the enum or as its name (checked, since no key type fits both)."""
_SHIPPED = Path(__file__).with_name("rules")
_KEYS = {"schema_version", "name", "description", "units", "evidence", "provenance"}


def shipped() -> list[str]:
    """Names of the rule sets that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


class Rules:
    """Which unit shares one second-moment scalar, for every role.

    Attributes:
        name: the rule set's name.
        units: role -> unit, complete.
        description: what the set is and where it comes from.
        evidence: JSON-able measurements that justify it (empty for sets taken from a paper).
        provenance: JSON-able record of how it was made.

    Example:
        >>> Rules("adam_mini")[Role.QUERY]
        <Unit.ATTENTION_HEAD: 'ATTENTION_HEAD'>
    """

    def __init__(
        self,
        name: str,
        units: UnitMap | None = None,
        *,
        description: str = "",
        evidence: Any = None,
        provenance: Any = None,
    ) -> None:
        """Load a shipped set by its name, or build a set of your own from ``units``.

        Roles missing from ``units`` take the unit they have in ``adam_mini``.

        Raises:
            ValueError: ``name`` is no shipped set and no units are given; an unknown role or unit; a unit that
                makes no sense for its role.
        """
        if units is None:
            if name not in shipped():
                raise ValueError(
                    f"rules={name!r} is not one of the shipped sets {shipped()}; or pass a path to a .json file"
                )
            document = _read(_SHIPPED / f"{name}.json")
            units, description = document["units"], document["description"]
            evidence, provenance = document["evidence"], document["provenance"]
        chosen = _checked(units, name)
        base = {} if len(chosen) == len(Role) else Rules("adam_mini").units
        self.name = name
        self.units: dict[Role, Unit] = {**base, **chosen}
        self.description = description
        self.evidence = evidence
        self.provenance = provenance

    def __getitem__(self, role: Role) -> Unit:
        return self.units[role]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self.units == other.units

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.units.items())))

    def __repr__(self) -> str:
        return f"Rules({self.name!r}, {{{', '.join(f'{r.value}: {u.value}' for r, u in self.units.items())}}})"

    def replace(self, name: str, units: UnitMap) -> Rules:
        """A copy under another name with some roles' units changed."""
        return Rules(name, {**self.units, **_checked(units, name)}, description=self.description)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "description": self.description,
            "units": {role.value: unit.value for role, unit in self.units.items()},
            "evidence": self.evidence,
            "provenance": self.provenance,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the rules as JSON; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Rules) -> Rules:
        """Rules from a file, a shipped set's name, or rules as they are.

        Raises:
            FileNotFoundError: a path that does not exist.
            ValueError: not a rules file, another schema version, an unknown role or unit.
        """
        if isinstance(source, Rules):
            return source
        if isinstance(source, str) and source in shipped():
            return cls(source)
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"rules={str(source)!r} is neither a shipped set ({', '.join(shipped())}) nor an existing file; "
                "`make hessian` writes one to out/hessian/rules.json"
            )
        document = _read(path)
        return cls(
            document["name"],
            document["units"],
            description=document["description"],
            evidence=document["evidence"],
            provenance=document["provenance"],
        )


def _read(path: Path) -> dict[str, Any]:
    """Parse and check a rules document."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"rules file {path} is not valid JSON ({error}); write it with Rules.save") from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ValueError(f"rules file {path} has no schema_version; write it with Rules.save")
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"rules file {path} has schema_version={document['schema_version']!r}; this release reads version "
            f"{SCHEMA_VERSION}: write the file again with this release, or upgrade"
        )
    unknown, missing = document.keys() - _KEYS, {"name", "units"} - document.keys()
    if unknown or missing:
        raise ValueError(f"rules file {path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    if not isinstance(document["name"], str) or not isinstance(document["units"], dict):
        raise ValueError(f"rules file {path}: 'name' must be a string and 'units' an object of role -> unit")
    _checked(document["units"], str(path))
    return {"description": "", "evidence": None, "provenance": None, **document}


def _checked(units: UnitMap, where: str) -> dict[Role, Unit]:
    """Roles and units as enums, or a ValueError that names the offending word and the ones that exist."""
    out: dict[Role, Unit] = {}
    for key, value in units.items():
        try:
            role = Role(key)
        except ValueError:
            raise ValueError(
                f"rules {where!r} name an unknown role {key!r}; known: {[r.value for r in Role]}"
            ) from None
        try:
            unit = Unit(value)
        except ValueError:
            raise ValueError(
                f"rules {where!r} give {role.value} an unknown unit {value!r}; known: {[u.value for u in Unit]}"
            ) from None
        if unit is Unit.ATTENTION_HEAD and role not in HEAD_ROLES:
            raise ValueError(
                f"rules {where!r} give {role.value} the unit ATTENTION_HEAD, which only "
                f"{sorted(r.value for r in HEAD_ROLES)} have; choose OUT_NEURON or TENSOR"
            )
        out[role] = unit
    return out
