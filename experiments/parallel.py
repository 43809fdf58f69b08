"""Run on one process or many: wrap the model, split batches, and exchange the loss and the wish to stop."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["ddp", "fsdp2"]
Device = Literal["cpu", "cuda"]


@contextmanager
def process_group(device: Device) -> Iterator[None]:
    """Initialise the process group if torchrun started this process.

    Inside the context, the first process logs from level INFO and the others from level WARNING.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield
        return
    store, rank, world = next(iter(dist.rendezvous("env://")))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps its store over a restart, with the addresses of the dead processes, so every attempt needs its
        # own prefix. On several nodes this prefix would be wrong, because each agent counts restarts separately; there,
        # the user must tell torchrun not to share its store.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Checkpoints are written from host memory, so gloo is needed in addition to NCCL.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    logging.getLogger().setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: rank of this process.
        world: number of processes.
        kind: ``alone``, ``ddp`` or ``fsdp2``.
        device: device of this process.
    """

    rank: int
    world: int
    kind: Literal["alone", "ddp", "fsdp2"]
    device: torch.device

    @classmethod
    def here(cls, parallel: Parallel, device: Device, batch: int) -> Team:
        """Describe the current processes.

        Args:
            parallel: ``ddp`` or ``fsdp2``.
            device: ``cpu`` or ``cuda``.
            batch: number of sequences of a global batch.

        Raises:
            ValueError: the batch does not divide over the processes, FSDP2 has no process group, or there is no GPU.
        """
        joined = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        if batch % world:
            raise ValueError(f"batch={batch} does not divide over {world} processes; choose a multiple")
        if parallel == "fsdp2" and not joined:
            raise ValueError(
                "parallel='fsdp2' needs a process group; start with torchrun --nproc-per-node N -m experiments.train, "
                "or use parallel='ddp'"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no GPU; use device='cpu', or install a CUDA build of torch")
        index = int(os.environ.get("LOCAL_RANK", "0"))
        local_device = torch.device("cpu") if device == "cpu" else torch.device("cuda", index)
        if device == "cuda":
            torch.cuda.set_device(local_device)  # NCCL, streams and pinned memory use the current device
        kind: Any = "fsdp2" if parallel == "fsdp2" else "ddp" if world > 1 else "alone"
        return cls(rank, world, kind, local_device)

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to this process's device. FSDP2 moves it block by block, so that no device has all of it."""
        return model if self.kind == "fsdp2" else model.to(self.device)

    def wrap(self, model: nn.Module, precision: str = "fp32") -> nn.Module:
        """Return the module to call instead of the model. Under FSDP2 the model itself is sharded, block by block.

        Args:
            model: the model.
            precision: with ``bf16``, FSDP2 gathers parameters in bf16 and reduces gradients in fp32. The shards that
                the optimizer steps are fp32. It does not change DDP.
        """
        if self.kind == "ddp":
            return DistributedDataParallel(model)
        if self.kind == "fsdp2":
            policy = MixedPrecisionPolicy()
            if precision == "bf16":
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            # Without a mesh, FSDP2 takes the machine's accelerator, even for a run on the CPU.
            mesh = init_device_mesh(self.device.type, (self.world,))
            for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
                for block in layers:
                    fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def local_rows(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return this process's rows of a global batch."""
        return tuple(part[self.rank :: self.world].to(self.device) for part in batch)

    def agree(self, loss: Tensor, stop: bool) -> tuple[float, bool]:
        """Return the global batch's loss, and whether any process wants to stop.

        One all-reduce carries both, so that all processes stop after the same step.
        """
        if self.world == 1:
            return loss.item(), stop
        message = torch.stack([loss.detach(), loss.new_tensor(float(stop))])
        dist.all_reduce(message)
        return (message[0] / self.world).item(), bool(message[1] > 0)

    def from_first(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if not dist.is_initialized():
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def peak_on_device(device: torch.device) -> dict[str, int]:
    """Return the most memory that tensors of this process had on its GPU; an empty dict on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_device_mib": torch.cuda.max_memory_allocated(device) >> 20}


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 over every full tensor of the model's state, in the order of their names.

    Every process has to call this function, because it gathers sharded tensors, one at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        content = full.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
