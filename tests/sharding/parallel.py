"""Parallel styles beside plain data and tensor parallelism, each against one process with averaged gradients.

Sequence parallelism, mixed precision and offload with tensor parallelism are wrappers, as those in ``training``.
Expert and pipeline parallelism give each rank other modules, so they have training loops of their own.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from optimizer import AdamMini
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import (
    OPTIONS,
    STEPS,
    TOGETHER,
    WRAPS,
    Run,
    _blocks,
    clip,
    counted,
    difference,
    fsdp2,
    reference,
    start,
    tensor_parallel,
    train_case,
)

__all__ = ["train_case"]  # with the wrappers below


def _mesh(*names: str) -> Any:
    """(everything else, 2) ranks."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=names)


# --- wrappers -----------------------------------------------------------------------------------------------------


def _sequence() -> dict[str, Any]:
    """Activations between matrices are dealt out along the sequence; norms see a part of it each."""
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.attention_norm": SequenceParallel(), "layers.*.ffn_norm": SequenceParallel(),
        "norm": SequenceParallel(),
        "layers.*.attention": whole, "layers.*.feed_forward": whole,
        "layers.*.attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }  # fmt: skip
    out = {f"layers.*.attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    return plan | out | {f"layers.*.feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}


def sequence(model: nn.Module) -> nn.Module:
    mesh = _mesh("dp", "tp")
    parallelize_module(model, mesh["tp"], _sequence())
    return model if mesh["dp"].size() == 1 else fsdp2(model, mesh=mesh["dp"])


def _tp_offload(model: nn.Module) -> nn.Module:
    mesh = _mesh("dp", "tp")
    tensor_parallel(model, mesh["tp"])
    return fsdp2(model, mesh=mesh["dp"], offload_policy=CPUOffloadPolicy(pin_memory=False))


def _mixed(model: nn.Module) -> nn.Module:
    kept = next(model.parameters()).dtype
    return fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=kept))


def _experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("MixtralExperts")]


def _gather(experts: nn.Module) -> None:
    """Let every rank compute with all experts: the exchange of tokens is no concern of the optimizer's."""
    plain = type(experts).forward

    def forward(self: nn.Module, *arguments: Any) -> Tensor:
        own = dict(self._parameters)
        for name, parameter in own.items():
            if isinstance(parameter, DTensor):
                self._parameters[name] = parameter.full_tensor(grad_placements=[Partial()])
        try:
            return plain(self, *arguments)
        finally:
            self._parameters.update(own)

    experts.forward = types.MethodType(forward, experts)


def _expert_parallel(model: nn.Module) -> nn.Module:
    """Experts dealt out over pairs of ranks and by FSDP2 over the pairs; everything else by FSDP2 over all ranks."""
    mesh = _mesh("pairs", "experts")
    everyone = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    for experts in _experts(model):
        for name, parameter in list(experts.named_parameters(recurse=False)):
            dealt = distribute_tensor(parameter.detach(), mesh["experts"], [Shard(0)])
            experts.register_parameter(name, nn.Parameter(dealt))
        _gather(experts)
        fully_shard(experts, mesh=mesh["pairs"])
    return fsdp2(model, mesh=everyone)


STYLES = {
    "sequence": sequence,
    "tp-fsdp2-offload": _tp_offload,
    "fsdp2-mixed": _mixed,
    "experts": _expert_parallel,
}
WRAPS |= STYLES
TOGETHER |= {"sequence": 2, "tp-fsdp2-offload": 2}


# --- cases --------------------------------------------------------------------------------------------------------


@contextmanager
def _in_bf16(model: nn.Module) -> Iterator[None]:
    """While this is open the model computes with its parameters rounded to bf16, as FSDP2's policy has it."""
    own = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    for module, name, parameter in own:
        module._parameters[name] = parameter.bfloat16()
    try:
        yield
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


def mixed_precision(dtype: str) -> dict[str, Any]:
    """Masters in ``dtype``, everything else in bf16; against one process that casts alike."""
    kind = getattr(torch, dtype)
    run = start("llama", "fsdp2-mixed", dtype=kind)
    run.train(0, STEPS)
    model = MODELS["llama"]().to(kind)
    optimizer = AdamMini(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches(step, run.world):
            with _in_bf16(model):
                loss = loss_of(model, batch)
            loss.backward()
        for parameter in model.parameters():
            parameter.grad /= run.world
        clip(list(model.parameters()))
        optimizer.step()
    wanted = {name: p.detach() for name, p in model.named_parameters()}
    exact = {name: p.detach() for name, p in reference_of(run, kind).items()}
    return {"difference": difference(run, "llama", wanted), "rounding": difference(run, "llama", exact)}


def reference_of(run: Run, dtype: torch.dtype, name: str = "llama") -> dict[str, Tensor]:
    """One process, in full precision."""
    return reference(run, name, "model", dtype, STEPS)


def expert_parallel(dtype: str) -> dict[str, Any]:
    """Ranks own other experts; all of them see all tokens."""
    kind = getattr(torch, dtype)
    run = start("mixtral", "experts", dtype=kind)
    owned = [p for experts in _experts(run.model) for p in experts.parameters()]
    for step in range(STEPS):
        run.optimizer.zero_grad()
        loss_of(run.model, batches(step, run.world)[run.rank]).backward()
        for parameter in owned:  # summed over the two ranks of a pair, averaged over pairs
            parameter.grad /= 2
        clip(list(run.model.parameters()))
        with counted(run.messages):
            run.optimizer.step()
    meshes = {p.device_mesh.mesh_dim_names for p in owned}
    wanted = reference_of(run, kind, "mixtral")
    return {"difference": difference(run, "mixtral", wanted), "messages": run.messages, "meshes": meshes}


class Stage(nn.Module):
    """A half of the Llama, under the names that its layers have in the whole."""

    def __init__(self, whole: nn.Module, which: int) -> None:
        super().__init__()
        layers: nn.ModuleDict = nn.ModuleDict({str(which): _blocks(whole)[which]})
        if which == 0:
            self.tok_embeddings, self.layers = whole.tok_embeddings, layers
        else:
            self.layers, self.norm, self.output = layers, whole.norm, whole.output

    def forward(self, x: Tensor) -> Tensor:
        x = self.tok_embeddings(x) if hasattr(self, "tok_embeddings") else x
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x)) if hasattr(self, "output") else x


def pipeline() -> dict[str, Any]:
    """Two stages with a layer each; on more ranks each stage is sharded by FSDP2 over its own ranks."""
    mesh = _mesh("dp", "pp")
    which, replica, replicas = mesh.get_coordinate()[1], mesh.get_coordinate()[0], mesh.size(0)
    model = Stage(MODELS["llama"]().double(), which)
    if replicas > 1:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
    stage = PipelineStage(model, which, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    loss = lambda out, wanted: nn.functional.cross_entropy(out.flatten(0, 1), wanted.flatten())  # noqa: E731
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    optimizer, messages = AdamMini(model, **OPTIONS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = batches(step, replicas)[replica]
        schedule.step(*([tokens[:, :-1]] if which == 0 else []), **({} if which == 0 else {"target": tokens[:, 1:]}))
        _clip_across(model, mesh["pp"].get_group())
        with counted(messages):
            optimizer.step()
    run = Run(model, optimizer, "ddp", replicas, replica, [])
    wanted = reference_of(run, torch.float64)
    worst = 0.0
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        worst = max(worst, float((whole.detach() - wanted[name]).abs().max()))
    return {"difference": worst, "messages": messages, "layers": sorted(model.layers)}


def _clip_across(model: nn.Module, group: Any) -> None:
    """Clip by the norm of all stages' gradients."""
    gradients = [p.grad for p in model.parameters()]
    squares = [(g.full_tensor() if isinstance(g, DTensor) else g).square().sum() for g in gradients]
    total = torch.stack(squares).sum()
    dist.all_reduce(total, group=group)
    for gradient in gradients:
        gradient *= (1.0 / (total.sqrt() + 1e-6)).clamp(max=1.0)


def cases(ranks: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> function and arguments, for 2 ranks or more, an even number."""
    here = "tests.sharding.parallel:"
    out: dict[str, tuple[str, dict[str, Any]]] = {}
    for dtype in ("float64", "float32"):
        for wrap in ("sequence", "tp-fsdp2-offload"):
            out[f"{wrap}-{dtype}"] = f"{here}train_case", {"model": "llama-parallel", "wrap": wrap, "dtype": dtype}
        out[f"mixed-{dtype}"] = f"{here}mixed_precision", {"dtype": dtype}
        out[f"experts-{dtype}"] = f"{here}expert_parallel", {"dtype": dtype}
    return out | {"pipeline-float64": (f"{here}pipeline", {})}


def bar(name: str) -> float:
    """What a case may differ by; Mixtral routes in fp32 whatever its weights are."""
    return 1e-12 if name.endswith("float64") and not name.startswith("experts") else 1e-6


def complaint(name: str, answers: list[Any]) -> str:
    """What is wrong with the ranks' answers; empty where nothing is."""
    errors = [answer for answer in answers if isinstance(answer, str)]
    if errors:
        return f"{name}: {errors[0][:2000]}"
    worst = max(answer["difference"] for answer in answers)
    if not worst <= bar(name):
        return f"{name} differs by {worst:.1e}, more than {bar(name):.0e}"
    groups = [answer.get("groups", 1) for answer in answers]
    sent = [len(answer.get("messages", [])) for answer in answers]
    return "" if all(n <= STEPS * g for n, g in zip(sent, groups, strict=True)) else f"{name} sends {sent} messages"
