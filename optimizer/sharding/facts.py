"""Descriptions of flattened parameters, which the wrapper of the library that flattened them attaches to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..partition.factored import TensorLayout
from ..partition.roles import Anatomy
from .flat import FlatLayout, Range

_FACTS = "_adam_mini_flat"


@dataclass(frozen=True)
class FlatFacts:
    """Which elements of which tensors a flattened and sharded parameter consists of.

    Attributes:
        names: names of the tensors whose ranges it contains; a single name if every tensor is flattened separately.
        anatomies: anatomy of each whole tensor.
        bounds: for each tensor, the [start, stop) of every rank.
        offsets: for each tensor, the index of its first local element in the local parameter.
        rank: this rank's position in the process group.
        numel: number of elements of the local parameter.
        group: name of the process group that shares the parameter; empty if this rank has all of it.
        mixed: whether several tensors were joined into one parameter.
        advice: the next action for error messages, if the parameter no longer has ``numel`` elements.
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

    def layout(self, layout_of: Callable[[Anatomy, str], TensorLayout], *, exempt: bool) -> FlatLayout:
        """Return the layout of the local parameter.

        Args:
            layout_of: returns the layout of a whole tensor from its anatomy and name.
            exempt: whether norms and biases do not decay although they were joined with weights that decay.
        """
        tensors = zip(self.names, self.anatomies, self.bounds, self.offsets, strict=True)
        ranges = tuple(
            Range(
                anatomy.shape,
                layout_of(anatomy, name),
                bounds,
                self.rank,
                offset,
                anatomy.decays or not (exempt and self.mixed),
                name,
            )
            for name, anatomy, bounds, offset in tensors
        )
        return FlatLayout(ranges, self.numel, self.group, self.advice)


def leave_facts(parameter: Tensor, facts: FlatFacts) -> None:
    """Attach the description to a parameter."""
    setattr(parameter, _FACTS, facts)


def facts_of(parameter: Tensor) -> FlatFacts | None:
    """Return the description attached to a parameter; None if there is none or the number of elements has changed."""
    facts = getattr(parameter, _FACTS, None)
    return facts if isinstance(facts, FlatFacts) and parameter.shape == (facts.numel,) else None
