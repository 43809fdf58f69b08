"""What every rank does in the multi-process tests: train sharded, and compare with one process.

Each rank runs the single-process reference for itself. Which elements a rank holds is found out by sharding the same
model once more with its elements numbered, so the comparison asks nothing of the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adam_mini import Adam_mini
from optimizer import AdamMini, tag
from optimizer.sharding.exchange import groups_in_order
from tests.sharding.models import MODELS, batches, loss_of

STEPS = 10
FINE = "as it should be"
"""What a rank answers where there is nothing to compare outside."""
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
Wrap = Callable[[nn.Module], nn.Module]


def local(tensor: Tensor) -> Tensor:
    """This rank's elements."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


# --- ways to shard ------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> list[nn.Module]:
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and "Expert" not in type(m[0]).__name__
    ]
    return list(lists[0])


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    for block in _blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _columns(parameter: nn.Parameter) -> Shard | None:
    last = parameter.ndim - 1
    return Shard(last) if last > 0 and parameter.shape[last] % dist.get_world_size() == 0 else None


def _hsdp(model: nn.Module) -> nn.Module:
    world = dist.get_world_size()
    shape = (2, world // 2) if world % 2 == 0 and world > 2 else (1, world)
    return fsdp2(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


PLAN = {
    "tok_embeddings": lambda: RowwiseParallel(input_layouts=Replicate()),
    "layers.*.attention.wq": ColwiseParallel, "layers.*.attention.wk": ColwiseParallel,
    "layers.*.attention.wv": ColwiseParallel, "layers.*.attention.wo": RowwiseParallel,
    "layers.*.feed_forward.w1": ColwiseParallel, "layers.*.feed_forward.w3": ColwiseParallel,
    "layers.*.feed_forward.w2": RowwiseParallel,
    "output": lambda: ColwiseParallel(output_layouts=Replicate()),
}  # fmt: skip


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    # Torch multiplies by evenly dealt columns alone, and whole heads are wanted; a vocabulary may be uneven.
    even = {"attention": 6 % mesh.size() == 0, "feed_forward": 36 % mesh.size() == 0}
    uneven = [part for part, fits in even.items() if not fits]
    plan = {name: style() for name, style in PLAN.items() if not any(part in name for part in uneven)}
    return parallelize_module(model, mesh, plan)


def _tp_fsdp(model: nn.Module, tp: int = 2) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    return fsdp2(model, mesh=mesh["dp"])


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: nn.Module, original: bool, **options: Any) -> nn.Module:
    options = {"auto_wrap_policy": ModuleWrapPolicy({type(_blocks(model)[0])})} | options
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"), **options)


_LAYERS = CustomPolicy(lambda module: isinstance(module, nn.Linear))
"""Every layer by itself, as policies by size and PEFT's do: between a projection and its attention stands FSDP."""


WRAPS: dict[str, Wrap] = {
    "fsdp1": lambda model: fsdp1(model, True),
    "fsdp1-flat": lambda model: fsdp1(model, False),
    "fsdp1-layers": lambda model: fsdp1(model, True, auto_wrap_policy=_LAYERS),
    "ddp": _ddp,
    "fsdp2": fsdp2,
    "fsdp2-columns": lambda model: fsdp2(model, shard_placement_fn=_columns),
    "fsdp2-offload": lambda model: fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hsdp": _hsdp,
    "tp": tensor_parallel,
    "tp-fsdp2": _tp_fsdp,
}
TOGETHER = {"tp-fsdp2": 2}
"""Ranks that share a batch, by wrapper; all others have a batch each."""


# --- training -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A sharded model in training, and the collectives its steps took."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    wrap: str
    world: int
    rank: int
    messages: list[tuple[int, int]]
    """(ranks in the group, bytes) of every collective inside ``step``."""

    @property
    def sharing(self) -> int:
        """Ranks that work on one batch together, neighbours."""
        return self.world if self.wrap == "tp" else TOGETHER.get(self.wrap, 1)

    @property
    def replicas(self) -> int:
        """Different batches per step."""
        return self.world // self.sharing

    @property
    def replica(self) -> int:
        return self.rank // self.sharing

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss_of(self.model, batches(step, self.replicas)[self.replica]).backward()
            self._clip()
            with counted(self.messages):
                self.optimizer.step()

    def _clip(self) -> None:
        clip(list(self.model.parameters()), group=dist.group.WORLD if self.wrap.startswith("fsdp1") else None)


def clip(parameters: list[nn.Parameter], *, group: Any = None) -> None:
    """Clip by the norm of all gradients; by hand: torch's cannot mix meshes, and FSDP1's takes no float64."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = [g.full_tensor().square().sum() if isinstance(g, DTensor) else g.square().sum() for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=parameters[0].dtype)
    if group is not None:
        dist.all_reduce(total, group=group)
    scale = (1.0 / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale)


class counted:
    """Counts the collectives that Python code starts."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier",
             "all_to_all_single", "all_gather_object", "all_gather_coalesced", "all_reduce_coalesced")  # fmt: skip

    def __init__(self, into: list[tuple[int, int]]) -> None:
        self.into, self.before = into, {name: getattr(dist, name) for name in self.NAMES}

    def __enter__(self) -> None:
        for name, call in self.before.items():
            setattr(dist, name, self._wrapped(call))

    def _wrapped(self, call: Any) -> Any:
        def wrapped(tensor: Any, *arguments: Any, group: Any = None, **more: Any) -> Any:
            nbytes = tensor.numel() * tensor.itemsize if isinstance(tensor, Tensor) else -1
            self.into.append((dist.get_world_size(group), nbytes))
            return call(tensor, *arguments, group=group, **more)

        return wrapped

    def __exit__(self, *_: object) -> None:
        for name, call in self.before.items():
            setattr(dist, name, call)


BUILDS: dict[str, Callable[[nn.Module, Wrap], tuple[nn.Module, Any]]] = {}


def build(kind: str) -> Any:
    def register(function: Any) -> Any:
        BUILDS[kind] = function
        return function

    return register


@build("model")
def _from_model(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(model)
    return wrapped, wrapped


@build("names")
def _from_names(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(model)
    return wrapped, list(wrapped.named_parameters())


@build("tag-after")
def _from_tags(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(model)
    tag(wrapped)
    return wrapped, list(wrapped.parameters())


@build("tag-before")
def _from_early_tags(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(tag(model))
    return wrapped, list(wrapped.parameters())


class Swapped(list):  # type: ignore[type-arg]
    """Parameters of a model that an optimizer is built from before the model is sharded."""


@build("swapped")
def _from_unsharded(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    return model, Swapped([wrap])


@build("door")
def _through_the_door(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(model)
    return wrapped, list(wrapped.named_parameters())


@build("groups")
def _from_groups(model: nn.Module, wrap: Wrap) -> tuple[nn.Module, Any]:
    wrapped = wrap(model)
    named = list(wrapped.named_parameters())
    return wrapped, [{"params": named[1::2]}, {"params": named[::2], "lr": OPTIONS["lr"]}]


def optimizer_of(kind: str) -> Any:
    """The class, and for the published package's what its users tell it of the model."""
    return partial(Adam_mini, dim=24, n_heads=6, n_kv_heads=3) if kind == "door" else AdamMini


def start(name: str, wrap: str, kind: str = "model", dtype: torch.dtype = torch.float64, **options: Any) -> Run:
    """A sharded model with its optimizer."""
    model, params = BUILDS[kind](MODELS[name]().to(dtype), WRAPS[wrap])
    if isinstance(params, Swapped):  # as Accelerate does: sharded parameters are put into the groups by name
        optimizer = AdamMini(model, **OPTIONS | options)
        named = dict(params[0](model).named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [named[name] for name in group["param_names"]]
    else:
        optimizer = optimizer_of(kind)(params, **OPTIONS | options)
    return Run(model, optimizer, wrap, dist.get_world_size(), dist.get_rank(), [])


def reference(run: Run, name: str, kind: str, dtype: torch.dtype, steps: int, **options: Any) -> dict[str, Tensor]:
    """Parameters after the same steps in one process, from averaged gradients. They must not be changed."""
    return _reference(run.replicas, name, kind, dtype, steps, tuple(sorted(options.items())))


@cache
def _reference(
    replicas: int, name: str, kind: str, dtype: torch.dtype, steps: int, options: tuple[tuple[str, Any], ...]
) -> dict[str, Tensor]:
    """Compute ``reference`` once for all cases of this process that compare with it."""
    model, params = BUILDS[kind](MODELS[name]().to(dtype), lambda model: model)
    optimizer = optimizer_of(kind)(model if isinstance(params, Swapped) else params, **OPTIONS | dict(options))
    for step in range(steps):
        optimizer.zero_grad()
        torch.stack([loss_of(model, batch) for batch in batches(step, replicas)]).mean().backward()
        clip(list(model.parameters()))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def plain(name: str) -> str:
    """The name without what wrappers add."""
    for prefix in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name


@cache
def elements(name: str, wrap: str) -> dict[str, Tensor]:
    """Which elements of the model every local tensor holds, numbered through all parameters from 1; 0: padding."""
    model, first = MODELS[name]().to(torch.float64), 1
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(first, first + p.numel(), dtype=torch.float64).view(p.shape))
            first += p.numel()
    return {plain(n): local(p) for n, p in WRAPS[wrap](model).named_parameters()}


def difference(run: Run, name: str, wanted: dict[str, Tensor]) -> float:
    """The largest difference of any element held here."""
    whole, at, worst = torch.cat([p.flatten() for p in wanted.values()]), elements(name, run.wrap), 0.0
    told = torch.cat([_told(n, p) for n, p in wanted.items()])
    for n, p in run.model.named_parameters():
        number = at[plain(n)]
        assert number.shape == local(p).shape, n
        index = number[number > 0].long() - 1
        apart = (local(p)[number > 0] - whole[index]).abs() * (told[index] if p.dtype != torch.float64 else 1)
        worst = max(worst, float(apart.max()) if apart.numel() else 0.0)
    return worst


def _told(name: str, parameter: Tensor) -> Tensor:
    """1 where an element says something: a key's bias cannot change an attention, its gradient is rounding alone."""
    told = torch.ones(parameter.numel())
    if name.endswith("c_attn.bias"):
        told[parameter.numel() // 3 : 2 * parameter.numel() // 3] = 0
    return told


def train_case(model: str, wrap: str, kind: str = "model", dtype: str = "float64", **options: Any) -> dict[str, Any]:
    """Ten steps, sharded and not."""
    kind_of = getattr(torch, dtype)
    run = start(model, wrap, kind, kind_of, **options)
    run.train(0, STEPS)
    wanted = reference(run, model, kind, kind_of, STEPS, **options)
    geometries = [shard.geometry for shard in run.optimizer._shards._shards.values()]
    layouts = {
        position: run.optimizer.layouts[position[0]][position[1]]
        for position, shard in run.optimizer._shards._shards.items()
        if shard.geometry.cut is not None
        and (shard.geometry.cut.size or (shard.geometry.columns is not None and shard.geometry.columns.all_groups))
    }
    return {
        "difference": difference(run, model, wanted),
        "messages": run.messages,
        "groups": len(groups_in_order(geometries)),
        # fp32 and float64: one number per block, one per tensor that says whether any rank has a gradient.
        "limit": 8 * sum(layout.n_blocks + (dtype == "float64") for layout in layouts.values()),
        "state": {type(s["exp_avg"]).__name__ for s in run.optimizer.state.values()},
    }
