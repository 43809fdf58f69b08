"""Check that all ranks have the same model, rules and groups, once before the first step.

The check uses the key-value store that started the process groups. Ranks with different models, rules or orders of
groups would also enter different collectives, so a check that is itself a collective would hang. The store does not
hang, and it identifies the ranks that differ.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from .exchange import ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_rounds: Counter[tuple[int, ...]] = Counter()  # checks made so far, by the ranks of the group


def require_agreement(group: ProcessGroup, facts: Sequence[tuple[str, str]]) -> None:
    """Compare the parameters of every rank of a group with those of the group's first rank.

    Args:
        group: the process group. All of its ranks must make this call equally often.
        facts: for each parameter, in order: (its description for messages, everything that ranks must agree on).

    Raises:
        RuntimeError: some ranks differ (the message lists them) or did not make the call. Nothing has been stepped.
    """
    ranks, rank = ranks_of(group), dist.get_rank()
    round_ = _rounds[ranks]
    _rounds[ranks] += 1
    store = dist.distributed_c10d._get_default_store()
    prefix = f"adam_mini/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}/{round_}"
    digest = hashlib.sha256("\n".join(f"{name}\t{fact}" for name, fact in facts).encode()).hexdigest()
    store.set(f"{prefix}/{rank}", f"{digest} {len(facts)} {facts[0][0] if facts else 'nothing'}")
    try:
        if rank == ranks[0]:
            answers = {r: store.get(f"{prefix}/{r}").decode() for r in ranks}
            differing = [r for r in ranks if answers[r].split()[0] != digest]
            verdict = "" if not differing else _complaint(ranks[0], differing, answers)
            store.set(f"{prefix}/verdict", verdict or "alike")
        else:
            verdict = store.get(f"{prefix}/verdict").decode().removeprefix("alike")
    except dist.DistError as error:
        missing = [r for r in ranks if not store.check([f"{prefix}/{r}"])]
        raise RuntimeError(
            f"rank {rank} waited for ranks {missing or list(ranks[:1])} before its first step; every rank of a process "
            "group that shards parameters must call step()"
        ) from error
    if verdict:
        raise RuntimeError(verdict)


def _complaint(first: int, differing: list[int], answers: dict[int, str]) -> str:
    """Return the error message for ranks that differ from the first rank of their group."""

    def words(rank: int) -> str:
        _, count, name = answers[rank].split(maxsplit=2)
        return f"rank {rank}: {count} parameters from {name}"

    return (
        f"ranks {differing} hold other parameters, layouts, placements or another order of groups than rank {first} "
        f"({words(first)}; {words(differing[0])}); build the same model, rules and groups on every rank"
    )
