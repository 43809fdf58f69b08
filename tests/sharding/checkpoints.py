"""Cases that ranks run for the tests of checkpoints: save with some number of ranks, resume with another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard

from optimizer import AdamMini, tag
from optimizer.sharding import load_full_state_dict
from optimizer.tools.convert.file import convert_file
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import FINE, OPTIONS, clip, fsdp1, fsdp2, local, plain


def shares() -> int:
    """Number of batches of a step. Every number of ranks up to all of them divides it, so each takes equally many."""
    return math.lcm(*range(1, 1 + dist.get_world_size()))


def _start(
    name: str, mesh: DeviceMesh | None, wrap: Any = None, **more: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MODELS[name]().to(torch.float64)
    if mesh is not None:
        model = wrap(model, mesh)
    return model, AdamMini(model, **OPTIONS, **more)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: int, first: int, last: int) -> None:
    rank = dist.get_rank() if ranks else 0
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, torch.cat(batches(step, shares())[rank :: max(1, ranks)])).backward()
        flat = isinstance(model, FullyShardedDataParallel)
        clip(list(model.parameters()), group=model.process_group if flat else None)
        optimizer.step()


WRAPS = {
    "fsdp2": lambda model, mesh: fsdp2(model, mesh=mesh),
    "fsdp2-columns": lambda model, mesh: fsdp2(
        model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 6 == 0 else None
    ),
    "fsdp1": lambda model, mesh: fsdp1(model, True, process_group=mesh.get_group()),
    "fsdp1-flat": lambda model, mesh: fsdp1(model, False, process_group=mesh.get_group()),
}


def checkpoint_case(name: str, wrap: str, folder: str, flatten: bool, **more: Any) -> dict[str, Any]:
    """Train three steps on n ranks, save, and train three more on m, for every n and m up to the number of ranks.

    Returns:
        "n to m" -> the largest difference of a parameter from six steps in one process, for the m of this rank.
    """
    alone = _start(name, None, **more)
    _train(*alone, 0, 0, 6)
    wanted = dict(alone[0].named_parameters())
    worlds = range(1, 1 + dist.get_world_size())
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in worlds}  # making a mesh is collective
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    worst = {}
    for n, mesh in meshes.items():
        if dist.get_rank() < n:
            model, optimizer = _start(name, mesh, WRAPS[wrap], **more)
            _train(model, optimizer, n, 0, 3)
            document = {"model": get_model_state_dict(model),
                        "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}  # fmt: skip
            dcp.save(document, checkpoint_id=_path(folder, name, wrap, n, more), process_group=mesh.get_group())
        dist.barrier()
        for m, others in meshes.items():
            if dist.get_rank() < m:
                path = _path(folder, name, wrap, n, more)
                worst[f"{n} to {m}"] = _go_on(name, wrap, path, others, options, wanted, more)
            dist.barrier()
    return worst


def _path(folder: str, name: str, wrap: str, ranks: int, more: dict[str, Any]) -> Path:
    return Path(folder, "-".join(map(str, (name, wrap, ranks, *more.values()))))


def _go_on(
    name: str,
    wrap: str,
    folder: Path,
    mesh: DeviceMesh,
    options: StateDictOptions,
    wanted: dict[str, Any],
    more: dict[str, Any],
) -> float:
    model, optimizer = _start(name, mesh, WRAPS[wrap], **more)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # so that a parameter that is not loaded is noticed
    document = {"model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}  # fmt: skip
    dcp.load(document, checkpoint_id=folder, process_group=mesh.get_group())
    set_model_state_dict(model, document["model"])
    set_optimizer_state_dict(model, optimizer, document["optimizer"], options=options)
    _train(model, optimizer, mesh.size(), 3, 6)
    return _apart(model, wanted)


def _apart(model: nn.Module, wanted: dict[str, Any]) -> float:
    if not isinstance(model, FullyShardedDataParallel):
        return max(float((p.full_tensor() - wanted[n]).abs().max()) for n, p in model.named_parameters())
    with FullyShardedDataParallel.summon_full_params(model):
        return max(float((p - wanted[plain(n)]).abs().max()) for n, p in model.named_parameters())


def state_is_whole(name: str = "gpt2") -> str:
    """The state gathered from all ranks equals the state of training in one process."""
    model, optimizer = _start(name, DeviceMesh("cpu", list(range(dist.get_world_size()))), WRAPS["fsdp2"])
    alone = _start(name, None)
    _train(model, optimizer, dist.get_world_size(), 0, 4)
    _train(*alone, 0, 0, 4)
    for (n, p), q in zip(model.named_parameters(), alone[0].parameters(), strict=True):
        own, wanted = optimizer.state[p], alone[1].state[q]
        for key in ("exp_avg", "exp_avg_sq"):
            whole = own[key].full_tensor()
            if whole.shape != wanted[key].shape or not torch.allclose(whole, wanted[key], rtol=1e-9, atol=1e-18):
                return f"{key} of {n}: {(whole - wanted[key]).abs().max()}"
        if local(own["exp_avg_sq"]).numel() > own["exp_avg_sq"].numel():
            return f"{n} holds more than there is"
    return FINE


def _as_in_one_process(model: nn.Module, name: str) -> str:
    """Compare weights with one process: three steps of AdamW, its state converted, and three steps of AdamMini."""
    alone = MODELS[name]().to(torch.float64)
    first = torch.optim.AdamW(alone.parameters(), **OPTIONS)
    _train(alone, first, 0, 0, 3)
    second = AdamMini(list(tag(alone).named_parameters()), **OPTIONS)
    second.load_state_dict(first.state_dict(), convert=True)
    _train(alone, second, 0, 3, 6)
    worst = _apart(model, {n: p.detach() for n, p in alone.named_parameters()})
    return FINE if worst <= 1e-12 else f"{worst} apart from one process"


def adamw_case(name: str, wrap: str) -> str:
    """Sharded AdamW state is refused. With ``convert=True`` training continues as in one process."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    model, _ = _start(name, mesh, WRAPS[wrap])
    before = torch.optim.AdamW(model.parameters(), **OPTIONS)
    _train(model, before, dist.get_world_size(), 0, 3)
    saved = before.state_dict()
    optimizer = AdamMini(list(tag(model).named_parameters()), **OPTIONS)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        if "convert=True" not in str(error) and "convert" not in str(error):
            return f"refused without advice: {error}"
    else:
        return "AdamW's state was taken for ours"
    optimizer.load_state_dict(saved, convert=True)
    _train(model, optimizer, dist.get_world_size(), 3, 6)
    return _as_in_one_process(model, name)


def converted_folder_case(name: str, folder: str, flatten: bool) -> str:
    """One rank converts a sharded AdamW checkpoint and all ranks load it. Training continues as in one process."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    model, _ = _start(name, mesh, WRAPS["fsdp2"])
    before = torch.optim.AdamW(model.parameters(), **OPTIONS)
    _train(model, before, dist.get_world_size(), 0, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    held = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, before, options=options)}
    source, target = Path(folder, f"adamw-{flatten}"), Path(folder, f"ours-{flatten}.pt")
    dcp.save(held, checkpoint_id=source)
    if dist.get_rank() == 0:
        convert_file(source, target, MODELS[name]().to(torch.float64))
        if [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]:
            return "scratch files are left"
    dist.barrier()
    document = torch.load(target, mmap=True, weights_only=True)["optimizer"]
    optimizer = AdamMini(list(tag(model).named_parameters()), **OPTIONS)
    load_full_state_dict(optimizer, document)
    _train(model, optimizer, dist.get_world_size(), 3, 6)
    return _as_in_one_process(model, name)
