"""The results of a verification, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """Whether gradients prove a layout, contradict it, or leave it undecided."""

    PROVEN = "proven"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """The verdict on one parameter.

    Attributes:
        name: name of the parameter.
        verdict: whether gradients prove or contradict its layout, or leave it undecided.
        claim: the parameter's parts and heads according to the partition, in words.
        why: the evidence, or the reason why there is no decision.
    """

    name: str
    verdict: Verdict
    claim: str
    why: str


@dataclass(frozen=True)
class Report:
    """All findings on a model.

    Attributes:
        findings: one finding for each parameter that is, or might be, a query, key or value projection.
        forwards: descriptions of the forward passes that were run.
    """

    findings: tuple[Finding, ...]
    forwards: tuple[str, ...]

    def of(self, verdict: Verdict) -> list[Finding]:
        """Return the findings with this verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    @property
    def contradicted(self) -> list[Finding]:
        """The findings whose layouts are contradicted by gradients."""
        return self.of(Verdict.CONTRADICTED)

    def __str__(self) -> str:
        order = (Verdict.CONTRADICTED, Verdict.UNDECIDED, Verdict.PROVEN)
        rows = [(f.verdict.value, f.name, f.claim, f.why) for verdict in order for f in self.of(verdict)]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        counts = ", ".join(f"{len(self.of(verdict))} {verdict.value}" for verdict in reversed(order))
        return "\n".join([*lines, "", f"{counts}; forward passes: {'; '.join(self.forwards) or 'none'}"])
