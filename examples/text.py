"""What the examples share: real text that is always there, and a language model small enough for a processor."""

from __future__ import annotations

import argparse
import functools
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 256
"""Tokens are bytes."""
LENGTH = 64


@functools.cache
def corpus() -> Tensor:
    """The sources of Python's standard library as bytes, uint8 [about 5 million]."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def window(index: int) -> Tensor:
    """The text from a place that only ``index`` decides, int64 [LENGTH]."""
    start = index * 7_919 * LENGTH % (len(corpus()) - LENGTH)
    return corpus()[start : start + LENGTH].long()


def batch(step: int, rank: int = 0, world: int = 1, size: int = 4) -> Tensor:
    """A rank's own sequences of a step, int64 [size, LENGTH]: no two ranks and no two steps have the same."""
    first = (step * world + rank) * size
    return torch.stack([window(first + i) for i in range(size)])


class Windows(torch.utils.data.Dataset):
    """The same sequences, in the same order, as a dataset for trainers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": window(index), "labels": window(index)}


def tiny_llama(seed: int = 0) -> Any:
    """A Llama of 108,000 parameters with random weights: 4 query heads, 2 key and value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        use_cache=False,
    ))  # fmt: skip


def arguments(**choices: Any) -> argparse.Namespace:
    """The command line of an example: ``--out``, ``--steps``, and options given as name=(default, *others) or name=None
    where anything may be said."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="where rank 0 saves losses and weights")
    parser.add_argument("--steps", type=int, default=10)
    for name, values in choices.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=values and values[0], choices=values)
    return parser.parse_args()


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Every weight, gathered from all ranks, under its name in the model as it was before it was wrapped."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
    from torch.distributed.tensor import DTensor

    if isinstance(model, FullyShardedDataParallel):  # offload_to_cpu would hand out freed memory where all is on CPUs
        full = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, full):
            return {name: w.clone() for name, w in model.state_dict().items()}
    if type(model).__module__.startswith("deepspeed"):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in model.module.named_parameters()}
    held = {name.removeprefix("module."): w for name, w in model.state_dict().items()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in held.items()}


def leave(out: Path | None, losses: list[float], weights: dict[str, Tensor], **more: Any) -> None:
    """Print the losses; save them, the weights and anything else if asked to. Rank 0 does, the others do nothing."""
    if int(os.environ.get("RANK", "0")):
        return
    print(" ".join(f"{loss:.3f}" for loss in losses))
    if out is not None:
        torch.save({"losses": losses, "weights": {n: w.detach().cpu() for n, w in weights.items()}, **more}, out)
