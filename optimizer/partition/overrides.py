"""Overrides: units for single parameters, as ordered (pattern, unit) pairs of which the first match applies."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .names import clean
from .roles import Role, Unit


@dataclass(frozen=True)
class Override:
    """The unit of every parameter whose name matches a pattern, regardless of its role.

    Attributes:
        pattern: a glob that must match the whole name in ``named_parameters()``, without the prefixes of DDP, FSDP,
            torch.compile and activation checkpointing. ``*`` matches any text, including dots; ``?`` matches one
            character; ``[0-3]`` matches one character of a set. Matching is case-sensitive. A leading ``*.`` also
            matches the empty string, so ``*.lm_head.weight`` matches ``lm_head.weight`` at any depth, including the
            top level.
        unit: the unit of the parameter; in a fused tensor, of every part.
    """

    pattern: str
    unit: Unit

    def matches(self, name: str) -> bool:
        """Whether a parameter name matches the pattern; prefixes of wrappers in the name are ignored."""
        name, pattern = clean(name), clean(self.pattern)
        return fnmatchcase(name, pattern) or (pattern.startswith("*.") and fnmatchcase(name, pattern[2:]))


def first_match(overrides: Iterable[Override], name: str) -> Override | None:
    """Return the first override whose pattern matches the name; None if there is none."""
    return next((override for override in overrides if override.matches(name)), None)


def require_matches(overrides: Sequence[Override], names: Iterable[str], where: str) -> None:
    """Check that every pattern matches a parameter, so that a typing error is not ignored silently.

    Args:
        overrides: the overrides to check.
        names: the names of all parameters of a model.
        where: the name of the rules, for the message.

    Raises:
        ValueError: a pattern matches no name; the message has the closest names.
    """
    unique_names = list(dict.fromkeys(clean(name) for name in names))
    for override in overrides:
        if not any(override.matches(name) for name in unique_names):
            closest = _closest(override.pattern, unique_names)
            raise ValueError(
                f"rules {where!r}: the override {override.pattern!r} ({override.unit.value}) matches none of the "
                f"{len(unique_names)} parameters; closest: {', '.join(closest) or 'none'}. Correct or remove the "
                "pattern (it must match a whole name in named_parameters(); a tied weight has one name, its first)"
            )


def refuse_headless(override: Override | None, name: str, sizes: Iterable[tuple[Role, int | None]]) -> None:
    """Refuse an override that asks for attention heads of a tensor that has none.

    Args:
        override: the override that applies to the tensor; None if there is none.
        name: the parameter's name.
        sizes: (role, head_dim) of every part of the tensor.

    Raises:
        ValueError: the unit is ATTENTION_HEAD and a part has no ``head_dim``. The message has the pattern, the
            parameter, its role, and the units that are possible.
    """
    if override is None or override.unit is not Unit.ATTENTION_HEAD:
        return
    for role, head_dim in sizes:
        if head_dim is None:
            raise ValueError(
                f"the override {override.pattern!r} gives {name!r} the unit ATTENTION_HEAD, but its {role.value} units "
                "have no attention heads, or their head_dim is unknown; choose OUT_NEURON or TENSOR, narrow the "
                "pattern, or pass the model itself instead of names and parameters"
            )


def _closest(pattern: str, names: list[str]) -> list[str]:
    """Return up to three names similar to a pattern; of names that differ only in numbers, the first is considered."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    example = clean(pattern).removeprefix("*.").replace("*", "0")
    return difflib.get_close_matches(example, list(kinds.values()), n=3, cutoff=0.0)
