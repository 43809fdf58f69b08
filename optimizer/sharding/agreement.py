"""Do all ranks mean the same? Asked once, before the first step, through the store that started the process groups.

Ranks that disagree about a model, rules or the order of groups also disagree about who takes part in which message:
a collective that asks would hang for the same reason. The store is no collective, and names the ranks.
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

_rounds: Counter[tuple[int, ...]] = Counter()


def require_agreement(group: ProcessGroup, facts: Sequence[tuple[str, str]]) -> None:
    """Compare what the ranks of a group hold with the group's first rank.

    Args:
        group: all of its ranks must ask as often as each other.
        facts: (parameter in words, everything ranks must agree on about it), in order.

    Raises:
        RuntimeError: some ranks hold something else, all named, or did not come; nothing has been stepped then.
    """
    ranks, me = ranks_of(group), dist.get_rank()
    round_ = _rounds[ranks]
    _rounds[ranks] += 1
    store = dist.distributed_c10d._get_default_store()
    prefix = f"adam_mini/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}/{round_}"
    own = hashlib.sha256("\n".join(f"{name}\t{fact}" for name, fact in facts).encode()).hexdigest()
    store.set(f"{prefix}/{me}", f"{own} {len(facts)} {facts[0][0] if facts else 'nothing'}")
    try:
        if me == ranks[0]:
            said = {rank: store.get(f"{prefix}/{rank}").decode() for rank in ranks}
            others = [rank for rank in ranks if said[rank].split()[0] != own]
            verdict = "" if not others else _complaint(ranks[0], others, said)
            store.set(f"{prefix}/verdict", verdict or "alike")
        else:
            verdict = store.get(f"{prefix}/verdict").decode().removeprefix("alike")
    except dist.DistError as error:
        missing = [rank for rank in ranks if not store.check([f"{prefix}/{rank}"])]
        raise RuntimeError(
            f"rank {me} waited for ranks {missing or list(ranks[:1])} before its first step; every rank of a process "
            "group that shards parameters must call step()"
        ) from error
    if verdict:
        raise RuntimeError(verdict)


def _complaint(first: int, others: list[int], said: dict[int, str]) -> str:
    def words(rank: int) -> str:
        _, count, name = said[rank].split(maxsplit=2)
        return f"rank {rank}: {count} parameters from {name}"

    return (
        f"ranks {others} hold other parameters, layouts, placements or another order of groups than rank {first} "
        f"({words(first)}; {words(others[0])}); build the same model, rules and groups on every rank"
    )
