"""Rules: role -> unit and single parameters' own units, plus the evidence, as files a person can read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import overrides as _overrides
from .overrides import Override
from .roles import Role, Unit
from .schema import SCHEMA_VERSION, checked_override, checked_units, read

UnitMap = Mapping[Any, Any]
"""Role -> unit, each as the enum or as its name (checked, since no key type fits both)."""
_SHIPPED = Path(__file__).with_name("rules")


def shipped() -> list[str]:
    """Names of the rule sets that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


class Rules:
    """Which unit shares one second-moment scalar, for every role, and for single parameters by name.

    Attributes:
        name: the rule set's name.
        units: role -> unit, complete.
        overrides: units of single parameters, before any role's; the first whose pattern matches a name wins.
        description: what the set is and where it comes from.
        evidence: JSON-able measurements that justify it (empty for sets taken from a paper).
        provenance: JSON-able record of how it was made.

    Example:
        >>> Rules("adam_mini")[Role.QUERY]
        <Unit.ATTENTION_HEAD: 'ATTENTION_HEAD'>
        >>> Rules("adam_mini").override({"*.lm_head.weight": Unit.ELEMENT}).unit_for("lm_head.weight", Role.HEAD)
        <Unit.ELEMENT: 'ELEMENT'>
    """

    def __init__(
        self,
        name: str,
        units: UnitMap | None = None,
        *,
        overrides: Mapping[str, Any] | Iterable[Override] = (),
        description: str = "",
        evidence: Any = None,
        provenance: Any = None,
    ) -> None:
        """Load a shipped set by its name, or build a set of your own from ``units``.

        Roles missing from ``units`` take the unit they have in ``adam_mini``. ``overrides`` are pattern -> unit (or
        ``Override`` objects), the first match wins; a pattern given twice counts once, where it stands first.

        Raises:
            ValueError: ``name`` is no shipped set and no units are given; an unknown role or unit; a unit that
                makes no sense for its role; a pattern that is not a string.
        """
        own = _own(overrides, name)
        if units is None:
            if name not in shipped():
                raise ValueError(
                    f"rules={name!r} is not one of the shipped sets {shipped()}; or pass a path to a .json file"
                )
            document = read(_SHIPPED / f"{name}.json")
            units, description = document["units"], document["description"]
            evidence, provenance = document["evidence"], document["provenance"]
            own = _once((*own, *document["overrides"]))
        chosen = checked_units(units, name)
        base = {} if len(chosen) == len(Role) else Rules("adam_mini").units
        self.name = name
        self.units: dict[Role, Unit] = {**base, **chosen}
        self.overrides = own
        self.description = description
        self.evidence = evidence
        self.provenance = provenance

    def __getitem__(self, role: Role) -> Unit:
        return self.units[role]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and (self.units, self.overrides) == (other.units, other.overrides)

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.units.items())), self.overrides))

    def __repr__(self) -> str:
        units = ", ".join(f"{role.value}: {unit.value}" for role, unit in self.units.items())
        own = ", ".join(f"{override.pattern!r}: {override.unit.value}" for override in self.overrides)
        return f"Rules({self.name!r}, {{{units}}}" + (f", overrides={{{own}}})" if own else ")")

    def override_for(self, name: str) -> Override | None:
        """The override that applies to a parameter of this name, if one does (none does without a name)."""
        return _overrides.first_match(self.overrides, name) if name else None

    def unit_for(self, name: str, role: Role) -> Unit:
        """What shares a scalar in a parameter of this name, in the part of this role."""
        override = self.override_for(name)
        return override.unit if override is not None else self.units[role]

    def require_matches(self, names: Iterable[str]) -> None:
        """Check the overrides against the names of a whole model's parameters.

        Raises:
            ValueError: a pattern that matches none of them, with the closest names.
        """
        if self.overrides:
            _overrides.require_matches(self.overrides, names, self.name)

    def override(self, units: Mapping[str, Any], name: str | None = None) -> Rules:
        """A copy in which parameters whose names match a pattern have a unit of their own.

        Args:
            units: pattern -> unit, as the enum or its name. A pattern is a glob over the whole name as
                ``model.named_parameters()`` gives it, without the prefixes of wrappers; ``*`` crosses dots, and a
                leading ``*.`` also matches nothing: ``*.lm_head.weight`` means a top-level ``lm_head.weight``, too.
                The first match wins; these patterns go before the ones that are there.
            name: the copy's name; None keeps the name.

        Returns:
            new rules, evidence and provenance kept: they speak of the roles, which stay as they are.

        Raises:
            ValueError: an unknown unit, or a pattern that is not a string. That a pattern matches nothing, or asks for
                heads where there are none, shows when the rules meet a model.

        Example:
            >>> Rules("adam_mini").override({"*.lm_head.weight": Unit.ELEMENT}).overrides[0].unit
            <Unit.ELEMENT: 'ELEMENT'>
        """
        if not isinstance(units, Mapping):
            raise ValueError(f"override({units!r}) must be given a dict of pattern -> unit")
        own = _own(units, self.name)
        return Rules(
            name or self.name, self.units, overrides=(*own, *self.overrides), description=self.description,
            evidence=self.evidence, provenance=self.provenance,
        )  # fmt: skip

    def replace(self, name: str, units: UnitMap) -> Rules:
        """A copy under another name with some roles' units changed; overrides stay, evidence does not."""
        changed = {**self.units, **checked_units(units, name)}
        return Rules(name, changed, overrides=self.overrides, description=self.description)

    def diff(self, other: Rules) -> Differences:
        """What differs: roles, patterns, and the order of patterns.

        Returns:
            a tuple of ``Difference``, readable as ``str``; empty when the rules are equal.
        """
        out = [
            Difference("role", role.value, self.units[role].value, other.units[role].value)
            for role in Role
            if self.units[role] is not other.units[role]
        ]
        left, right = ({o.pattern: o.unit.value for o in rules.overrides} for rules in (self, other))
        out += [
            Difference("override", pattern, left.get(pattern), right.get(pattern))
            for pattern in dict.fromkeys([*left, *right])
            if left.get(pattern) != right.get(pattern)
        ]
        orders = [[p for p in mine if p in theirs] for mine, theirs in ((left, right), (right, left))]
        if orders[0] != orders[1]:
            out.append(Difference("order", "overrides", " > ".join(orders[0]), " > ".join(orders[1])))
        return Differences(out)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "description": self.description,
            "units": {role.value: unit.value for role, unit in self.units.items()},
            "overrides": [{"pattern": o.pattern, "unit": o.unit.value} for o in self.overrides],
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
            TypeError: neither a name, a path nor rules.
            ValueError: not a rules file, another schema version, an unknown role, unit or key, a malformed override.
        """
        if isinstance(source, Rules):
            return source
        if isinstance(source, str) and source in shipped():
            return cls(source)
        if not isinstance(source, str | os.PathLike):
            raise TypeError(
                f"rules={source!r} must be a shipped set's name ({', '.join(shipped())}), a path or Rules; to build "
                "rules in code, change a set: Rules.load('adam_mini').replace(...)"
            )
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"rules={str(source)!r} is neither a shipped set ({', '.join(shipped())}) nor an existing file; "
                "`make hessian` writes one to out/hessian/rules.json"
            )
        document = read(path)
        del document["schema_version"]
        return cls(document.pop("name"), document.pop("units"), **document)


@dataclass(frozen=True)
class Difference:
    """One thing in which two rule sets differ.

    Attributes:
        kind: "role", "override" or "order".
        key: the role, or the pattern.
        left: the first set's unit; None where it has no such override.
        right: the second set's.
    """

    kind: str
    key: str
    left: str | None
    right: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.key}: {self.left or '(none)'} -> {self.right or '(none)'}"


class Differences(tuple[Difference, ...]):
    """Every difference, one a line as text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def _own(given: Mapping[str, Any] | Iterable[Override], where: str) -> tuple[Override, ...]:
    """Overrides from a mapping or from objects, checked."""
    if isinstance(given, Mapping):
        pairs: list[tuple[Any, Any]] = list(given.items())
    else:
        listed = list(given)
        if not all(isinstance(override, Override) for override in listed):
            raise ValueError(f"rules {where!r}: overrides={listed!r} must be a dict of pattern -> unit")
        pairs = [(override.pattern, override.unit) for override in listed]
    return _once(tuple(checked_override(pattern, unit, where) for pattern, unit in pairs))


def _once(given: tuple[Override, ...]) -> tuple[Override, ...]:
    """Without the later of two equal patterns, which could never apply."""
    first: dict[str, Override] = {}
    for override in given:
        first.setdefault(override.pattern, override)
    return tuple(first.values())
