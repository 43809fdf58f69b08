"""One process that is every rank of a sharded step in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from optimizer.sharding import exchange

NUMBERS: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
"""Hyper-parameters of a step."""


def _chunk(tensor: Tensor, ways: int, dim: int) -> list[Tensor]:
    chunks = list(tensor.chunk(ways, dim))
    return chunks + [tensor.narrow(dim, 0, 0)] * (ways - len(chunks))


def share(whole: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """This rank's part: as torch deals it out, or, where strided, inner dimensions first as FSDP2 does."""
    if not any(isinstance(p, _StridedShard) for p in placements):
        return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
    for m, placement in reversed(list(enumerate(placements))):
        if not isinstance(placement, Replicate):
            whole = _chunk(whole, mesh.size(m), placement.dim)[mesh.get_coordinate()[m]]
    return whole


def ranks(world: int) -> Iterator[int]:
    """Be every rank of a world in turn, with groups of torch's fake backend, which sends nothing."""
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        exchange.ranks_of.cache_clear()
        try:
            yield rank
        finally:
            dist.destroy_process_group()
