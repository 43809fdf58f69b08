"""Units for single parameters: ordered (pattern, unit) pairs over parameter names, the first match wins."""

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
    """The unit of every parameter whose name matches a pattern, whatever its role.

    Attributes:
        pattern: a glob over the whole parameter name as ``named_parameters()`` gives it, without the prefixes of DDP,
            FSDP, torch.compile and activation checkpointing. ``*`` matches any text, dots included; ``?`` one
            character; ``[0-3]`` one of a set; case counts. A leading ``*.`` also matches nothing, so that
            ``*.lm_head.weight`` means ``lm_head.weight`` at any depth, the top included.
        unit: what shares a scalar there, in every part of a fused tensor.
    """

    pattern: str
    unit: Unit

    def matches(self, name: str) -> bool:
        """Whether a parameter name, cleaned of wrappers' prefixes or not, matches the pattern."""
        name, pattern = clean(name), clean(self.pattern)
        return fnmatchcase(name, pattern) or (pattern.startswith("*.") and fnmatchcase(name, pattern[2:]))


def first_match(overrides: Iterable[Override], name: str) -> Override | None:
    """The first override whose pattern matches the name."""
    return next((override for override in overrides if override.matches(name)), None)


def require_matches(overrides: Sequence[Override], names: Iterable[str], where: str) -> None:
    """Raise when a pattern matches none of a model's parameters: a typo would otherwise do nothing, silently.

    Raises:
        ValueError: with the pattern, the closest names, and what to do.
    """
    known = list(dict.fromkeys(clean(name) for name in names))
    for override in overrides:
        if not any(override.matches(name) for name in known):
            closest = _closest(override.pattern, known)
            raise ValueError(
                f"rules {where!r}: the override {override.pattern!r} ({override.unit.value}) matches none of the "
                f"{len(known)} parameters; closest: {', '.join(closest) or 'none'}. Correct or remove the pattern "
                "(it must match a whole name as named_parameters() gives it; a tied weight has one name, its first)"
            )


def refuse_headless(override: Override | None, name: str, sizes: Iterable[tuple[Role, int | None]]) -> None:
    """Raise when an override asks for attention heads of a tensor that has none.

    Args:
        override: the override that applies, if one does.
        name: the parameter's name.
        sizes: (role, head_dim) of every part of the tensor.

    Raises:
        ValueError: naming the pattern, the parameter, its role, and the units that would do.
    """
    if override is None or override.unit is not Unit.ATTENTION_HEAD:
        return
    for role, head_dim in sizes:
        if head_dim is None:
            raise ValueError(
                f"the override {override.pattern!r} gives {name!r} the unit ATTENTION_HEAD, but its {role.value} units "
                "have no attention heads, or none whose head_dim is known; choose OUT_NEURON or TENSOR, narrow the "
                "pattern, or pass the model itself if only the names were given"
            )


def _closest(pattern: str, names: list[str]) -> list[str]:
    """Up to three names near a pattern, one of each kind of layer."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    wanted = clean(pattern).removeprefix("*.").replace("*", "0")
    return difflib.get_close_matches(wanted, list(kinds.values()), n=3, cutoff=0.0)
