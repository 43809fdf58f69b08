"""Rules: the unit of each role, overrides for single parameters, and the evidence for them, as JSON files."""

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
"""Role -> unit, each as an enum or as its name; checked at run time, because a Mapping's key type cannot be both."""
_SHIPPED = Path(__file__).with_name("rules")


def shipped() -> list[str]:
    """Return the names of the rule sets that the package contains."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


class Rules:
    """Which elements share one second-moment scalar: the unit of every role, and of single parameters by name.

    Attributes:
        name: the rule set's name.
        units: role -> unit, for every role.
        overrides: units of single parameters, which take precedence over the unit of the role; the first override
            whose pattern matches the name applies.
        description: what the set is and where it comes from.
        evidence: measurements that justify the set, in JSON types; None for sets taken from a paper.
        provenance: how the set was made, in JSON types.

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
        """Load a shipped set by its name, or build a new set from ``units``.

        Args:
            name: the name of a shipped set, or a new name if ``units`` is not None.
            units: role -> unit, each as an enum or as its name. Missing roles get their unit in ``adam_mini``. None
                loads the shipped set.
            overrides: pattern -> unit, or ``Override`` objects, in order of precedence. Of two equal patterns the
                first counts. They precede the overrides of a shipped set.
            description: what the set is and where it comes from.
            evidence: measurements that justify the set, in JSON types.
            provenance: how the set was made, in JSON types.

        Raises:
            ValueError: ``name`` is not a shipped set and ``units`` is None; a role or unit is unknown; a role cannot
                have its unit; or a pattern is not a string.
        """
        checked = _checked_overrides(overrides, name)
        if units is None:
            if name not in shipped():
                raise ValueError(
                    f"rules={name!r} is not one of the shipped sets {shipped()}; or pass a path to a .json file"
                )
            document = read(_SHIPPED / f"{name}.json")
            units, description = document["units"], document["description"]
            evidence, provenance = document["evidence"], document["provenance"]
            checked = _without_repeated((*checked, *document["overrides"]))
        chosen = checked_units(units, name)
        base = {} if len(chosen) == len(Role) else Rules("adam_mini").units
        self.name = name
        self.units: dict[Role, Unit] = {**base, **chosen}
        self.overrides = checked
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
        overrides = ", ".join(f"{override.pattern!r}: {override.unit.value}" for override in self.overrides)
        return f"Rules({self.name!r}, {{{units}}}" + (f", overrides={{{overrides}}})" if overrides else ")")

    def override_for(self, name: str) -> Override | None:
        """Return the override that applies to a parameter of this name; None if there is none or ``name`` is empty."""
        return _overrides.first_match(self.overrides, name) if name else None

    def unit_for(self, name: str, role: Role) -> Unit:
        """Return the unit of a parameter, or of a part of a fused parameter.

        Args:
            name: the parameter's name, which overrides are matched with; "" if it has none.
            role: the role of the parameter or part.
        """
        override = self.override_for(name)
        return override.unit if override is not None else self.units[role]

    def require_matches(self, names: Iterable[str]) -> None:
        """Check that every override matches one of the names of a model's parameters.

        Args:
            names: the names of all parameters of the model.

        Raises:
            ValueError: a pattern matches no name; the message has the closest names.
        """
        if self.overrides:
            _overrides.require_matches(self.overrides, names, self.name)

    def override(self, units: Mapping[str, Any], name: str | None = None) -> Rules:
        """Return a copy with units for single parameters, chosen by patterns over their names.

        Args:
            units: pattern -> unit, as an enum or as its name. A pattern is a glob that must match the whole name in
                ``model.named_parameters()``, without the prefixes of wrappers. ``*`` also matches dots, and a leading
                ``*.`` also matches the empty string, so ``*.lm_head.weight`` matches a top-level ``lm_head.weight``.
                The first match applies; these patterns precede the existing ones.
            name: the copy's name; None keeps the name.

        Returns:
            New rules with the same units of roles, evidence and provenance.

        Raises:
            ValueError: a unit is unknown, or a pattern is not a string. Whether a pattern matches a parameter, and
                whether that parameter has the attention heads that the unit needs, is checked with a model.

        Example:
            >>> Rules("adam_mini").override({"*.lm_head.weight": Unit.ELEMENT}).overrides[0].unit
            <Unit.ELEMENT: 'ELEMENT'>
        """
        if not isinstance(units, Mapping):
            raise ValueError(f"override({units!r}): the argument must be a dict of pattern -> unit")
        return Rules(
            name or self.name,
            self.units,
            overrides=(*_checked_overrides(units, self.name), *self.overrides),
            description=self.description,
            evidence=self.evidence,
            provenance=self.provenance,
        )

    def replace(self, name: str, units: UnitMap) -> Rules:
        """Return a copy in which some roles have other units; it keeps the overrides, but not the evidence.

        Args:
            name: the copy's name.
            units: role -> new unit, each as an enum or as its name.

        Raises:
            ValueError: a role or unit is unknown, or a role cannot have its unit.
        """
        changed = {**self.units, **checked_units(units, name)}
        return Rules(name, changed, overrides=self.overrides, description=self.description)

    def diff(self, other: Rules) -> Differences:
        """Compare the units of roles, the overrides, and the order of overrides with other rules.

        Returns:
            A tuple of ``Difference``, empty if the rules are equal. Its ``str`` has one line per difference.
        """
        differences = [
            Difference("role", role.value, self.units[role].value, other.units[role].value)
            for role in Role
            if self.units[role] is not other.units[role]
        ]
        left, right = ({o.pattern: o.unit.value for o in rules.overrides} for rules in (self, other))
        differences += [
            Difference("override", pattern, left.get(pattern), right.get(pattern))
            for pattern in dict.fromkeys([*left, *right])
            if left.get(pattern) != right.get(pattern)
        ]
        left_order, right_order = [p for p in left if p in right], [p for p in right if p in left]
        if left_order != right_order:
            differences.append(Difference("order", "overrides", " > ".join(left_order), " > ".join(right_order)))
        return Differences(differences)

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as a JSON document."""
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
        """Write the rules to a JSON file atomically; missing folders are created. Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Rules) -> Rules:
        """Load rules from a file or from a shipped set.

        Args:
            source: the name of a shipped set, the path of a rules file, or ``Rules``, which are returned unchanged.

        Raises:
            FileNotFoundError: the path does not exist.
            TypeError: ``source`` is not a name, a path or ``Rules``.
            ValueError: the file is not a rules file or has another schema version, a role, unit or key is unknown, or
                an override is malformed.
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
    """One difference between two rule sets.

    Attributes:
        kind: "role", "override" or "order".
        key: the role or the pattern; "overrides" for their order.
        left: the unit in the first set, or the order of its patterns; None if it has no such override.
        right: the unit in the second set, or the order of its patterns; None if it has no such override.
    """

    kind: str
    key: str
    left: str | None
    right: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.key}: {self.left or '(none)'} -> {self.right or '(none)'}"


class Differences(tuple[Difference, ...]):
    """All differences between two rule sets; ``str`` has one line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def _checked_overrides(overrides: Mapping[str, Any] | Iterable[Override], where: str) -> tuple[Override, ...]:
    """Return checked overrides from a mapping of pattern -> unit, or from ``Override`` objects."""
    if isinstance(overrides, Mapping):
        pairs: list[tuple[Any, Any]] = list(overrides.items())
    else:
        listed = list(overrides)
        if not all(isinstance(override, Override) for override in listed):
            raise ValueError(f"rules {where!r}: overrides={listed!r} must be a dict of pattern -> unit")
        pairs = [(override.pattern, override.unit) for override in listed]
    return _without_repeated(tuple(checked_override(pattern, unit, where) for pattern, unit in pairs))


def _without_repeated(overrides: tuple[Override, ...]) -> tuple[Override, ...]:
    """Remove overrides whose pattern occurs earlier, because they can never apply."""
    first: dict[str, Override] = {}
    for override in overrides:
        first.setdefault(override.pattern, override)
    return tuple(first.values())
