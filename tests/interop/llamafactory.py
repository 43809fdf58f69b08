"""LLaMA-Factory with this project's adam_mini, run by its own Python: check_llamafactory starts this.

``factory``: its function that makes the optimizer, for models whose configurations say more and less.
``train``: its ``run_exp``, and beside it a plain AdamMini that is given the same gradients.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from llamafactory.hparams import get_train_args
from llamafactory.train.trainer_utils import create_custom_optimizer
from llamafactory.train.tuner import run_exp
from torch import nn
from transformers import TrainerCallback

import adam_mini
from optimizer import AdamMini, partition

OPTIONS: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def settings(folder: Path, data: str, **more: Any) -> dict[str, Any]:
    """What ``llamafactory-cli train examples/llamafactory/sft.yaml`` reads, with paths."""
    import yaml

    own = yaml.safe_load(Path("examples/llamafactory/sft.yaml").read_text())
    paths = {"model_name_or_path": str(folder / "tiny"), "output_dir": str(folder / "saved"), "dataset_dir": data}
    return own | paths | more


def models() -> dict[str, nn.Module]:
    """Models by what a configuration says of dim, n_heads and n_kv_heads."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 48, "vocab_size": 64, "head_dim": 8}  # fmt: skip
    seen = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    return {
        "all three": transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
        "no n_kv_heads": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=32)
        ),
        "none": transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=small, vision_config=seen, mm_tokens_per_image=1)
        ),
    }


def factory(folder: Path, data: str) -> dict[str, Any]:
    """For each model: what the optimizer was told, whether its blocks are the model's, and five steps' difference."""
    _, _, training, finetuning, _ = get_train_args(settings(folder, data))
    out: dict[str, Any] = {}
    for name, model in models().items():
        beside = copy.deepcopy(model)
        optimizer = create_custom_optimizer(model, training, finetuning)
        plain = AdamMini(beside, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p, q in zip(model.parameters(), beside.parameters(), strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
            optimizer.step()
            plain.step()
        blocks = {
            key: layout.n_blocks
            for group, own in zip(optimizer.param_groups, optimizer.layouts, strict=True)
            for key, layout in zip(group["param_names"], own, strict=True)
        }
        out[name] = {
            "class": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
            "told": [optimizer.dim, optimizer.n_heads, optimizer.n_kv_heads],
            "same blocks": blocks == {key: layout.n_blocks for key, layout in partition(beside).items()},
            "difference": _apart(model, beside),
        }
    return out | {"file": adam_mini.__file__}


class Beside(TrainerCallback):
    """A copy of the model, stepped by a plain AdamMini just before the trainer steps its own."""

    def __init__(self) -> None:
        self.model: Any = None
        self.optimizers: set[str] = set()
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, model: Any, **more: Any) -> None:
        self.live, self.model = model, copy.deepcopy(model)
        self.plain = AdamMini(self.model, **OPTIONS)

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **more: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        self.optimizers.add(f"{type(inner).__module__}.{type(inner).__name__}")
        for group in self.plain.param_groups:
            group["lr"] = inner.param_groups[0]["lr"]
        for p, q in zip(model.parameters(), self.model.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        self.plain.step()

    def on_log(self, *_: Any, logs: dict[str, float], **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(folder: Path, data: str) -> dict[str, Any]:
    """Losses, and the difference of all weights from the copy's."""
    beside = Beside()
    run_exp(settings(folder, data), callbacks=[beside])
    return {
        "losses": beside.losses,
        "class": sorted(beside.optimizers),
        "file": adam_mini.__file__,
        "difference": _apart(beside.live, beside.model),
    }


def _apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["factory", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.save({"factory": factory, "train": train}[given.what](given.folder, given.data), given.out)
