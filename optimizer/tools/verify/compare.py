"""Gradient evidence against what the rules say of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...partition import Anatomy, Layout, Part, Role
from ...partition.roles import HEAD_ROLES
from .footprints import Footprints
from .report import Finding, Verdict

_SPARSE = 1  # features a value moves in each head


def claim_of(anatomy: Anatomy) -> str:
    """The claim in words: parts, heads, repeats."""
    parts = [f"{p.role.value} {p.size}" + (f" by {p.head_dim}" if p.head_dim else "") for p in anatomy.parts]
    text = "[" + "|".join(parts) + "]"
    return text if anatomy.repeat == 1 else f"{anatomy.repeat} x {text}"


def along_units(layout: Layout, anatomy: Anatomy) -> Tensor | None:
    """Block of every output unit, int64 [units]; None where blocks do not lie along the output axis."""
    if layout.fold != 1 or layout.leading or layout.axis != anatomy.axis:
        return None
    lengths = layout.runs.lengths()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def parts_of_units(anatomy: Anatomy) -> list[Part]:
    """The part every output unit belongs to."""
    return [part for part in anatomy.parts for _ in range(part.size)] * anatomy.repeat


def judge(name: str, anatomy: Anatomy, layout: Layout, evidence: Footprints | None, heads: Tensor | None) -> Finding:
    """The verdict on one projection.

    Args:
        name: the parameter.
        anatomy: what the table says of it.
        layout: its blocks under rules that share heads in queries and keys and nothing in values.
        evidence: its footprints; None where no forward pass reached it.
        heads: int64 [features of z], the heads of z as queries and keys show them; None where they do not.
    """
    claim = claim_of(anatomy)

    def found(verdict: Verdict, why: str) -> Finding:
        return Finding(name, verdict, claim, why)

    if evidence is None:
        return found(Verdict.UNDECIDED, "no forward pass leads from here to an output projection; give inputs that do")
    blocks = along_units(layout, anatomy)
    if blocks is None:
        return found(Verdict.UNDECIDED, "its blocks do not lie along the units of one matrix")
    if len(blocks) != len(evidence.moves):
        return found(Verdict.UNDECIDED, f"{len(evidence.moves)} units seen, {len(blocks)} in the weight")
    if not evidence.moves.any():
        return found(Verdict.UNDECIDED, "moves nothing at this output projection")
    kinds = _kinds(evidence, heads)
    parts = parts_of_units(anatomy)
    claimed = [part.role if part.role in HEAD_ROLES else None for part in parts]
    if len(evidence.moves) > 1 and bool(evidence.moves.all()) and int(blocks.max()) > 0 and Role.VALUE not in claimed:
        return found(Verdict.UNDECIDED, "every unit moves every feature: something mixes the heads on the way")
    if evidence.elsewhere is None and {Role.QUERY, Role.KEY} <= set(claimed):
        return found(Verdict.UNDECIDED, "positions before and after cannot be compared, so query and key look alike")
    for i, (role, kind) in enumerate(zip(claimed, kinds, strict=True)):
        if kind is not None and not parts[i].shared and not _agree(role, kind, evidence.elsewhere is not None):
            return found(
                Verdict.CONTRADICTED, f"unit {i} is said to be {parts[i].role.value} and behaves like a {kind}"
            )
    settled = [kind is None or part.shared for kind, part in zip(kinds, parts, strict=True)]
    return _grouping(found, blocks, evidence, claimed, kinds, settled)


def looks_like_attention(found: Mapping[str, Footprints], heads: Tensor | None) -> bool:
    """Whether there are queries, keys and values among the units, whatever they are called."""
    return {"query", "key", "value"} <= {kind for f in found.values() for kind in _kinds(f, heads) if kind}


def _kinds(evidence: Footprints, heads: Tensor | None) -> list[str | None]:
    """ "query", "key", "value", "gate" or None (moves nothing) for every unit."""
    out: list[str | None] = []
    for i, row in enumerate(evidence.moves):
        width = _widest(row, heads)
        elsewhere = bool(evidence.elsewhere[i]) if evidence.elsewhere is not None else None
        if not row.any():
            out.append(None)
        elif width <= _SPARSE:
            out.append("value" if elsewhere in (True, None) else "gate")
        else:
            out.append("key" if elsewhere else "query" if elsewhere is False else "query or key")
    return out


def _widest(row: Tensor, heads: Tensor | None) -> int:
    """Most features a unit moves within one head; without known heads, of the whole."""
    if heads is None:
        return int(row.sum())
    return int(torch.zeros(int(heads.max()) + 1, dtype=torch.int64).index_add_(0, heads, row.long()).max())


def _agree(role: Role | None, kind: str, positions: bool) -> bool:
    """Whether a behaviour fits what the table says of the unit."""
    if role is Role.VALUE:
        return kind == "value" or (kind == "gate" and not positions)
    if role is Role.QUERY:
        return kind in ("query", "query or key")
    if role is Role.KEY:
        return kind in ("key", "query or key")
    return True  # everything else keeps a scalar per unit, whatever it does


def _grouping(
    found: Callable[[Verdict, str], Finding],
    blocks: Tensor,
    evidence: Footprints,
    claimed: list[Role | None],
    kinds: list[str | None],
    settled: list[bool],
) -> Finding:
    """Whether blocks are exactly the heads: one block, one footprint, for queries and keys; one unit for the rest."""
    groups = evidence.groups
    alive = groups >= 0  # units that move nothing at this position neither prove nor contradict
    for i, (role, kind) in enumerate(zip(claimed, kinds, strict=True)):
        together = ((blocks == blocks[i]) & alive).nonzero().flatten()
        if settled[i]:
            continue  # moves nothing, or does two things, of which its footprint shows the wider
        if role not in (Role.QUERY, Role.KEY):
            wide = kind in ("query", "key", "query or key") and int((groups == groups[i]).sum()) > 1
            if wide and role is None:
                return found(Verdict.CONTRADICTED, f"unit {i} shares a head with others and has a scalar of its own")
            if len(together) > 1:
                return found(Verdict.CONTRADICTED, f"unit {i} shares its scalar with {len(together) - 1} others")
            continue
        alike = _head(i, groups, blocks, evidence)
        if not torch.equal(together, alike):
            return found(
                Verdict.CONTRADICTED,
                f"unit {i} shares its scalar with units {_span(together)}, but its head is {_span(alike)}",
            )
    numbers = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind}
    n_heads = len({int(groups[i]) for i, kind in enumerate(kinds) if kind in ("query", "key", "query or key")})
    seen = ", ".join(f"{n} {kind}" for kind, n in numbers.items())
    return found(Verdict.PROVEN, f"{seen} units" + (f" in {n_heads} heads" if n_heads else ""))


def _head(unit: int, groups: Tensor, blocks: Tensor, evidence: Footprints) -> Tensor:
    """The units of one head with this one: those of its footprint, less the blocks it does not act together with."""
    alike = groups == groups[unit]
    for block in blocks[alike].unique():
        if evidence.coupled is not None and block != blocks[unit]:
            other = int((alike & (blocks == block)).nonzero()[0])
            if not evidence.coupled(unit, other):
                alike &= blocks != block
    return alike.nonzero().flatten()


def _span(indices: Tensor) -> str:
    """A set of indices, short."""
    if len(indices) == 0:
        return "none"
    first, last = int(indices[0]), int(indices[-1])
    return f"{first}-{last}" if last - first + 1 == len(indices) else f"{first}...{last} ({len(indices)} of them)"
