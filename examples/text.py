"""Shared code of the examples: text that needs no download, and a language model small enough for a CPU."""

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
"""Number of tokens; tokens are bytes."""
LENGTH = 64
"""Tokens per sequence."""


@functools.cache
def corpus() -> Tensor:
    """Return the sources of Python's standard library as bytes, uint8 [about 5 million]."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def window(index: int) -> Tensor:
    """Return a sequence of the text, int64 [LENGTH]; its position depends only on ``index``."""
    start = index * 7_919 * LENGTH % (len(corpus()) - LENGTH)
    return corpus()[start : start + LENGTH].long()


def batch(step: int, rank: int = 0, world: int = 1, size: int = 4) -> Tensor:
    """Return a rank's sequences of a step, int64 [size, LENGTH]; they differ between ranks and between steps."""
    first = (step * world + rank) * size
    return torch.stack([window(first + i) for i in range(size)])


class Windows(torch.utils.data.Dataset):
    """The sequences of ``batch``, in the same order, as a dataset for trainers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": window(index), "labels": window(index)}


def tiny_llama(seed: int = 0) -> Any:
    """Build a Llama of 108,000 parameters with random weights, 4 query heads, and 2 key and value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def arguments(**choices: Any) -> argparse.Namespace:
    """Parse the command line of an example: ``--out``, ``--steps`` and the example's options.

    Args:
        choices: name=(default, *other choices) for an option with choices, name=None for an option with any value.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="where rank 0 saves losses and weights")
    parser.add_argument("--steps", type=int, default=10)
    for name, values in choices.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=values and values[0], choices=values)
    return parser.parse_args()


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Gather every weight from all ranks, under its name in the model before wrapping."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
    from torch.distributed.tensor import DTensor

    if isinstance(model, FullyShardedDataParallel):
        # If the model is on the CPU, offload_to_cpu=True returns memory that FSDP has already freed.
        full = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, full):
            return {name: w.clone() for name, w in model.state_dict().items()}
    if type(model).__module__.startswith("deepspeed"):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in model.module.named_parameters()}
    weights = {name.removeprefix("module."): w for name, w in model.state_dict().items()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def leave(out: Path | None, losses: list[float], weights: dict[str, Tensor], **more: Any) -> None:
    """Print the losses on rank 0, and save them with the weights if ``out`` is a path; other ranks do nothing.

    Args:
        out: path of the file, or None to save nothing.
        losses: loss of each step.
        weights: name -> full weight.
        more: further entries of the file.
    """
    if int(os.environ.get("RANK", "0")):
        return
    print(" ".join(f"{loss:.3f}" for loss in losses))
    if out is not None:
        torch.save({"losses": losses, "weights": {n: w.detach().cpu() for n, w in weights.items()}, **more}, out)
