"""Compare gradient evidence with the blocks that the rules assign to a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...partition import Anatomy, Layout, Part, Role
from ...partition.roles import HEAD_ROLES
from .footprints import Footprints
from .report import Finding, Verdict

_VALUE_WIDTH = 1  # number of features that a value unit moves in each head


def claim_of(anatomy: Anatomy) -> str:
    """Describe an anatomy in words: its parts, heads and repeats."""
    parts = [f"{p.role.value} {p.size}" + (f" by {p.head_dim}" if p.head_dim else "") for p in anatomy.parts]
    text = "[" + "|".join(parts) + "]"
    return text if anatomy.repeat == 1 else f"{anatomy.repeat} x {text}"


def along_units(layout: Layout, anatomy: Anatomy) -> Tensor | None:
    """Return the block of every output unit, int64 [units]; None if blocks do not lie along the output axis."""
    if layout.fold != 1 or layout.leading or layout.axis != anatomy.axis:
        return None
    lengths = layout.runs.lengths()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def parts_of_units(anatomy: Anatomy) -> list[Part]:
    """Return the part that every output unit belongs to."""
    return [part for part in anatomy.parts for _ in range(part.size)] * anatomy.repeat


def judge(name: str, anatomy: Anatomy, layout: Layout, evidence: Footprints | None, heads: Tensor | None) -> Finding:
    """Return the verdict on one projection.

    Args:
        name: name of the parameter.
        anatomy: the parameter's anatomy, which is the claim to be checked.
        layout: its blocks under rules with one scalar per head for queries and keys, and one per unit for values.
        evidence: its footprints; None if no forward pass reached it.
        heads: head of every feature of z according to the queries, int64 [features of z]; None if unknown.
    """
    claim = claim_of(anatomy)

    def finding(verdict: Verdict, why: str) -> Finding:
        return Finding(name, verdict, claim, why)

    if evidence is None:
        return finding(
            Verdict.UNDECIDED, "no forward pass leads from here to an output projection; give inputs that do"
        )
    blocks = along_units(layout, anatomy)
    if blocks is None:
        return finding(Verdict.UNDECIDED, "its blocks do not lie along the units of one matrix")
    if len(blocks) != len(evidence.moves):
        return finding(Verdict.UNDECIDED, f"{len(evidence.moves)} units seen, {len(blocks)} in the weight")
    if not evidence.moves.any():
        return finding(Verdict.UNDECIDED, "moves nothing at this output projection")
    kinds = _kinds(evidence, heads)
    parts = parts_of_units(anatomy)
    claimed = [part.role if part.role in HEAD_ROLES else None for part in parts]
    if len(evidence.moves) > 1 and bool(evidence.moves.all()) and int(blocks.max()) > 0 and Role.VALUE not in claimed:
        return finding(Verdict.UNDECIDED, "every unit moves every feature: something mixes the heads on the way")
    if evidence.elsewhere is None and {Role.QUERY, Role.KEY} <= set(claimed):
        return finding(Verdict.UNDECIDED, "positions before and after cannot be compared, so query and key look alike")
    for i, (role, kind) in enumerate(zip(claimed, kinds, strict=True)):
        if kind is not None and not parts[i].shared and not _agree(role, kind, evidence.elsewhere is not None):
            return finding(
                Verdict.CONTRADICTED, f"unit {i} is said to be {parts[i].role.value} and behaves like a {kind}"
            )
    settled = [kind is None or part.shared for kind, part in zip(kinds, parts, strict=True)]
    return _grouping(finding, blocks, evidence, claimed, kinds, settled)


def looks_like_attention(evidence: Mapping[str, Footprints], heads: Tensor | None) -> bool:
    """Return whether the units of some projections behave like queries, keys and values, whatever their names."""
    return {"query", "key", "value"} <= {kind for f in evidence.values() for kind in _kinds(f, heads) if kind}


def _kinds(evidence: Footprints, heads: Tensor | None) -> list[str | None]:
    """Classify every unit by its behaviour.

    Returns:
        "query", "key", "value" or "gate" for every unit; "query or key" if positions cannot be compared; None if the
        unit moves nothing.
    """
    out: list[str | None] = []
    for i, row in enumerate(evidence.moves):
        width = _width_in_a_head(row, heads)
        elsewhere = bool(evidence.elsewhere[i]) if evidence.elsewhere is not None else None
        if not row.any():
            out.append(None)
        elif width <= _VALUE_WIDTH:
            out.append("value" if elsewhere in (True, None) else "gate")
        else:
            out.append("key" if elsewhere else "query" if elsewhere is False else "query or key")
    return out


def _width_in_a_head(row: Tensor, heads: Tensor | None) -> int:
    """Return the largest number of features that a unit moves in one head; in total, if the heads are unknown."""
    if heads is None:
        return int(row.sum())
    return int(torch.zeros(int(heads.max()) + 1, dtype=torch.int64).index_add_(0, heads, row.long()).max())


def _agree(role: Role | None, kind: str, positions_known: bool) -> bool:
    """Return whether the behaviour of a unit agrees with its role."""
    if role is Role.VALUE:
        return kind == "value" or (kind == "gate" and not positions_known)
    if role is Role.QUERY:
        return kind in ("query", "query or key")
    if role is Role.KEY:
        return kind in ("key", "query or key")
    return True  # All other units have a scalar of their own, which is right for any behaviour.


def _grouping(
    finding: Callable[[Verdict, str], Finding],
    blocks: Tensor,
    evidence: Footprints,
    claimed: list[Role | None],
    kinds: list[str | None],
    settled: list[bool],
) -> Finding:
    """Check that blocks of queries and keys are exactly the heads, and that other units have a block each.

    Args:
        finding: makes a finding from a verdict and its reason.
        blocks: block of every unit, int64 [units].
        evidence: footprints of the units.
        claimed: query, key or value role of every unit; None for other roles.
        kinds: behaviour of every unit; None if it moves nothing.
        settled: whether a unit needs no check: it moves nothing, or it has several roles, in which case its footprint
            shows only the widest of them.
    """
    groups = evidence.groups
    moving = groups >= 0  # Units that move nothing neither prove nor contradict anything.
    for i, (role, kind) in enumerate(zip(claimed, kinds, strict=True)):
        block_units = ((blocks == blocks[i]) & moving).nonzero().flatten()
        if settled[i]:
            continue
        if role not in (Role.QUERY, Role.KEY):
            in_a_head = kind in ("query", "key", "query or key") and int((groups == groups[i]).sum()) > 1
            if in_a_head and role is None:
                return finding(Verdict.CONTRADICTED, f"unit {i} shares a head with others and has a scalar of its own")
            if len(block_units) > 1:
                return finding(Verdict.CONTRADICTED, f"unit {i} shares its scalar with {len(block_units) - 1} others")
            continue
        head_units = _head_units(i, groups, blocks, evidence)
        if not torch.equal(block_units, head_units):
            return finding(
                Verdict.CONTRADICTED,
                f"unit {i} shares its scalar with units {_span(block_units)}, but its head is {_span(head_units)}",
            )
    numbers = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind}
    n_heads = len({int(groups[i]) for i, kind in enumerate(kinds) if kind in ("query", "key", "query or key")})
    counts = ", ".join(f"{n} {kind}" for kind, n in numbers.items())
    return finding(Verdict.PROVEN, f"{counts} units" + (f" in {n_heads} heads" if n_heads else ""))


def _head_units(unit: int, groups: Tensor, blocks: Tensor, evidence: Footprints) -> Tensor:
    """Return the units of the head of ``unit``: those of its group, without blocks that it is not coupled with."""
    in_head = groups == groups[unit]
    for block in blocks[in_head].unique():
        if evidence.coupled is not None and block != blocks[unit]:
            other = int((in_head & (blocks == block)).nonzero()[0])
            if not evidence.coupled(unit, other):
                in_head &= blocks != block
    return in_head.nonzero().flatten()


def _span(indices: Tensor) -> str:
    """Write a sorted set of indices as a short text."""
    if len(indices) == 0:
        return "none"
    first, last = int(indices[0]), int(indices[-1])
    return f"{first}-{last}" if last - first + 1 == len(indices) else f"{first}...{last} ({len(indices)} of them)"
