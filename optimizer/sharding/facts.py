"""What a flattened parameter holds: left on it by the wrapper of the library that flattened it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..partition.layout import Layout
from ..partition.roles import Anatomy
from .flat import FlatLayout, Range

_FACTS = "_adam_mini_flat"


@dataclass(frozen=True)
class FlatFacts:
    """What a parameter that was flattened and cut over ranks holds.

    Attributes:
        names: of the tensors it holds ranges of; one, where every tensor is flattened by itself.
        anatomies: of those tensors, whole.
        bounds: for each, [start, stop) of every rank.
        offsets: for each, where its elements begin in this rank's box.
        rank: this rank's place in the group.
        numel: elements of this rank's box.
        group: name of the process group that the parameter is dealt out over; empty where no other rank holds any.
        mixed: whether tensors were joined into one parameter.
        advice: for messages: what to do where the parameter no longer has ``numel`` elements.
    """

    names: tuple[str, ...]
    anatomies: tuple[Anatomy, ...]
    bounds: tuple[tuple[tuple[int, int], ...], ...]
    offsets: tuple[int, ...]
    rank: int
    numel: int
    group: str
    mixed: bool
    advice: str = ""

    def layout(self, layout_of: Callable[[Anatomy, str], Layout], *, exempt: bool) -> FlatLayout:
        """Of the local box; ``exempt``: norms and biases that were joined with what decays do not decay."""
        ranges = tuple(
            Range(anatomy.shape, layout_of(anatomy, name), bounds, self.rank, offset,
                  anatomy.decays or not (exempt and self.mixed), name)
            for name, anatomy, bounds, offset in zip(self.names, self.anatomies, self.bounds, self.offsets, strict=True)
        )  # fmt: skip
        return FlatLayout(ranges, self.numel, self.group, self.advice)


def leave_facts(parameter: Tensor, facts: FlatFacts) -> None:
    """Stamp a parameter."""
    setattr(parameter, _FACTS, facts)


def facts_of(parameter: Tensor) -> FlatFacts | None:
    """What was left on a parameter, if it still has as many elements."""
    facts = getattr(parameter, _FACTS, None)
    return facts if isinstance(facts, FlatFacts) and parameter.shape == (facts.numel,) else None
