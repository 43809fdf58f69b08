"""The format of rules files: the checks when one is read, and an equivalent JSON Schema for other programs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .documents import parse_json
from .overrides import Override
from .roles import HEAD_ROLES, Role, Unit

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("rules") / "schema" / "rules.schema.json"
_KEYS = ("schema_version", "name", "description", "units", "overrides", "evidence", "provenance")


def read(path: Path) -> dict[str, Any]:
    """Parse and check a rules file.

    Args:
        path: the file.

    Returns:
        The document with all keys: "units" is a dict of role -> unit, "overrides" a tuple of ``Override``.

    Raises:
        ValueError: the file is invalid; the message has the file, the key, its value and the possible values.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"rules file {path} is not valid JSON ({error}); write it with Rules.save") from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ValueError(f"rules file {path} has no schema_version; write it with Rules.save")
    version = document["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(
            f"rules file {path} has schema_version={version!r}; this release reads version {SCHEMA_VERSION}: "
            "write the file again with this release, or upgrade"
        )
    if unknown := [key for key in document if key not in _KEYS]:
        raise ValueError(f"rules file {path}: unknown keys {unknown}; version {version} has {list(_KEYS)}")
    if missing := [key for key in ("name", "units") if key not in document]:
        raise ValueError(f"rules file {path}: missing keys {missing}; write it with Rules.save")
    for key, kind, expected in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("units", dict, "an object of role -> unit"),
        ("overrides", list, "a list of {'pattern': ..., 'unit': ...}"),
    ):
        if key in document and not isinstance(document[key], kind):
            raise ValueError(f"rules file {path}: {key!r}={document[key]!r} must be {expected}")
    where, listed = str(path), document.get("overrides", ())
    return {
        "description": "",
        "evidence": None,
        "provenance": None,
        **document,
        "units": checked_units(document["units"], where),
        "overrides": tuple(_override_from(index, entry, where) for index, entry in enumerate(listed)),
    }


def _override_from(index: int, entry: Any, where: str) -> Override:
    """Return the ``Override`` for one entry of a file's "overrides"."""
    key = f"overrides[{index}]"
    if not isinstance(entry, dict) or entry.keys() != {"pattern", "unit"}:
        raise ValueError(f"rules {where!r}: {key}={entry!r} must be an object with the keys 'pattern' and 'unit' only")
    return checked_override(entry["pattern"], entry["unit"], where, key)


def checked_override(pattern: Any, unit: Any, where: str, key: str = "override") -> Override:
    """Return an ``Override`` after checking its pattern and unit.

    Args:
        pattern: a glob over parameter names.
        unit: a ``Unit`` or its name.
        where: the rules' name or file, for the message.
        key: the key of the override, for the message.

    Raises:
        ValueError: the pattern is not a string or is empty, or the unit is unknown.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"rules {where!r}: {key}: the pattern {pattern!r} must be a string such as '*.lm_head.weight'")
    return Override(pattern, _unit(unit, where, f"{key} ({pattern!r})"))


def checked_units(units: Mapping[Any, Any], where: str) -> dict[Role, Unit]:
    """Return role -> unit as enums.

    Args:
        units: role -> unit, each as an enum or as its name.
        where: the rules' name or file, for the message.

    Raises:
        ValueError: a role or unit is unknown, or the unit is ATTENTION_HEAD for a role without heads.
    """
    checked: dict[Role, Unit] = {}
    for key, value in units.items():
        try:
            role = Role(key)
        except ValueError:
            roles = [role.value for role in Role]
            raise ValueError(
                f"rules {where!r} name an unknown role {key!r} (unit {value!r}){_nearest(key, roles)}; known: {roles}"
            ) from None
        unit = _unit(value, where, role.value)
        if unit is Unit.ATTENTION_HEAD and role not in HEAD_ROLES:
            raise ValueError(
                f"rules {where!r} give {role.value} the unit ATTENTION_HEAD, which only "
                f"{sorted(r.value for r in HEAD_ROLES)} have; choose OUT_NEURON or TENSOR"
            )
        checked[role] = unit
    return checked


def _unit(value: Any, where: str, receiver: str) -> Unit:
    """Return a unit from the enum or its name; ``where`` and ``receiver`` are for the message."""
    try:
        return Unit(value)
    except ValueError:
        units = [unit.value for unit in Unit]
        raise ValueError(
            f"rules {where!r} give {receiver} an unknown unit {value!r}{_nearest(value, units)}; known: {units}"
        ) from None


def _nearest(word: Any, allowed: Iterable[str]) -> str:
    """Return ", did you mean ...?" if an allowed word is similar, otherwise an empty string."""
    similar = difflib.get_close_matches(str(word).upper(), list(allowed), n=1)
    return f", did you mean {similar[0]!r}?" if similar else ""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a rules file, with the roles and units of this release."""
    units = [unit.value for unit in Unit]
    without_heads = [unit for unit in units if unit != Unit.ATTENTION_HEAD.value]
    override = {
        "type": "object",
        "description": "The unit of every parameter whose name matches; the first match in the list applies.",
        "properties": {
            "pattern": {
                "type": "string",
                "minLength": 1,
                "description": "A glob that must match the whole parameter name, without prefixes of wrappers. '*' "
                "also matches dots; a leading '*.' also matches the empty string. A pattern that matches no parameter "
                "of a model is an error.",
            },
            "unit": {"enum": units},
        },
        "required": ["pattern", "unit"],
        "additionalProperties": False,
    }
    properties: dict[str, Any] = {
        "schema_version": {"const": SCHEMA_VERSION},
        "name": {"type": "string"},
        "description": {"type": "string", "description": "What the set is and where it comes from."},
        "units": {
            "type": "object",
            "description": "Role -> the elements that share one second-moment scalar. A missing role has the unit it "
            "has in adam_mini.",
            "properties": {role.value: {"enum": units if role in HEAD_ROLES else without_heads} for role in Role},
            "additionalProperties": False,
        },
        "overrides": {"type": "array", "items": override},
        "evidence": {"description": "Measurements that justify the set; null for sets taken from a paper."},
        "provenance": {"description": "How the set was made."},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Partition rules of adam-mini-lab",
        "type": "object",
        "properties": properties,
        "required": ["schema_version", "name", "units"],
        "additionalProperties": False,
    }
