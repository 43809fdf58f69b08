"""What ranks do in the tests of process groups that end before training does.

Every rank prints how its last step ended, on its last line. ``workers`` would wait for the rank that dies here.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from optimizer import AdamMini
from tests import forking
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import OPTIONS, fsdp1, fsdp2, local

PATIENCE = 10
"""Seconds that a collective waits."""


def _trained(world: int, rank: int, mesh: Any = None) -> tuple[Any, AdamMini]:
    """A model after a step, with gradients for the next one."""
    model = fsdp2(MODELS["llama"](), **({} if mesh is None else {"mesh": mesh}))
    optimizer = AdamMini(model, **OPTIONS)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batches(step, world)[rank]).backward()
        if step == 0:
            optimizer.step()
    return model, optimizer


def dies(world: int, rank: int) -> AdamMini:
    """The last rank ends in ``step``, before what ranks share is sent."""
    _, optimizer = _trained(world, rank)
    if rank == world - 1:
        optimizer.register_step_pre_hook(lambda *_: os._exit(0))
    return optimizer


def group_gone(world: int, rank: int) -> AdamMini:
    """The group of the mesh is destroyed; the default one lives."""
    group = dist.new_group(range(world))
    _, optimizer = _trained(world, rank, DeviceMesh.from_group(group, "cpu"))
    dist.destroy_process_group(group)
    return optimizer


def all_gone(world: int, rank: int) -> AdamMini:
    """All groups are destroyed."""
    _, optimizer = _trained(world, rank)
    dist.destroy_process_group()
    return optimizer


def gone_before(world: int, rank: int) -> AdamMini:
    """All groups are destroyed before a second optimizer's first step."""
    model, _ = _trained(world, rank)
    optimizer = AdamMini(model, **OPTIONS)
    dist.destroy_process_group()
    return optimizer


def flat_gone_before(world: int, rank: int) -> AdamMini:
    """The same where FSDP1 flattened the parameters."""
    model = fsdp1(MODELS["llama"](), original=True)
    optimizer = AdamMini(model, **OPTIONS)
    loss_of(model, batches(0, world)[rank]).backward()
    dist.destroy_process_group()
    return optimizer


SCENES = {scene.__name__: scene for scene in (dies, group_gone, all_gone, gone_before, flat_gone_before)}


def run(scene: str, world: int) -> list[str]:
    """The last line that every rank printed; empty for a rank that died.

    Raises:
        subprocess.TimeoutExpired: a rank hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder, f"said{rank}") for rank in range(world)]  # files: a full pipe would stop a rank
        ranks = [forking.start(main, scene, folder, rank, world, output=told[rank]) for rank in range(world)]
        try:
            for process in ranks:
                process.wait(timeout=240)
        finally:
            for process in ranks:
                process.kill()
        lines = [said.read_text().strip().splitlines() for said in told]
    return [own[-1] if own else "" for own in lines]


def main(scene: str, folder: str, rank: int, world: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    optimizer = SCENES[scene](world, rank)
    before = [local(p).clone() for group in optimizer.param_groups for p in group["params"]]
    try:
        optimizer.step()
        said = "stepped"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
    after = [local(p) for group in optimizer.param_groups for p in group["params"]]
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sys.stdout.write(f"{'moved' if moved else 'unmoved'} {said}\n")
    sys.stdout.flush()
    os._exit(0)  # without waiting for those that are gone
