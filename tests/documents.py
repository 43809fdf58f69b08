"""README.md and docs/*.md as material for tests: their code blocks, and the prelude that the blocks may rely on.

The prelude is what a reader already has: a model with gradients, data, a loss function and hyper-parameters. A block
must import everything else. ``tests/test_docs.py`` runs the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizer import AdamMini, Rules
from tests.optimizer.models import Llama

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$", re.M | re.S)

MODULE = "from tests.documents import llama as make_model, tokens as batches\n"
"""What the command lines of the docs call ``my_module``."""


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: path relative to the repository.
        line: number of its first line in the page.
        language: as written behind the fence.
        text: what is inside.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [line for raw in joined.splitlines() if (line := raw.split(" #")[0].strip()) and line[0] != "#"]


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found["language"], found["text"])
        for found in _FENCE.finditer(text)
    ]


def all_blocks() -> list[Block]:
    """The fenced blocks of all pages."""
    return [b for path in PAGES for b in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


def without_blocks(text: str) -> str:
    """A page's text outside of its fenced blocks."""
    return _FENCE.sub("", text)


def llama() -> nn.Module:
    """A Llama with Meta's names, small enough for an exact Hessian."""
    return Llama(vocab=16, dim=8, layers=1, n_heads=4, n_kv_heads=2, hidden=8)


def tokens() -> list[Tensor]:
    """Two batches of tokens."""
    return list(torch.randint(0, 16, (2, 4, 9), generator=torch.Generator().manual_seed(0)))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token loss of a batch of tokens."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def prelude(folder: Path) -> dict[str, Any]:
    """Names that every block may use, and the files it may read in ``folder``, the current directory.

    ``model`` (a small Llama with gradients), ``optimizer`` (an AdamMini of it that has taken a step), ``loss(model,
    batch)``, ``first``, ``second`` and ``batches`` (batches of tokens), ``params`` (name -> parameter), and the
    hyper-parameters ``lr, beta1, beta2, eps, weight_decay`` and ``model_config`` of a training script. Files:
    ``adamw.pt`` (the state of a torch AdamW of the same model), ``out/hessian/rules.json``, ``my_module.py``.
    """
    (folder / "my_module.py").write_text(MODULE)
    (folder / "out" / "hessian").mkdir(parents=True)
    Rules.load("derived_blocks").save(folder / "out" / "hessian" / "rules.json")
    model, batches = llama(), tokens()
    adamw = torch.optim.AdamW(model.named_parameters())
    optimizer = AdamMini(model)
    loss(model, batches[0]).backward()
    adamw.step()
    optimizer.step()
    torch.save(adamw.state_dict(), folder / "adamw.pt")
    return {
        "model": model, "optimizer": optimizer, "loss": loss, "first": batches[0], "second": batches[1],
        "batches": batches, "params": dict(model.named_parameters()), "lr": 1e-3, "beta1": 0.9, "beta2": 0.95,
        "eps": 1e-8, "weight_decay": 0.1, "model_config": ModelConfig(),
    }  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The numbers a training script knows of ``llama()``."""

    dim: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2


def trainer_prelude(folder: Path) -> Iterator[dict[str, Any]]:
    """Names for the page on trainers: a transformers ``model``, ``data``, ``args``, and what Accelerate prepares.

    ``Trainer`` is transformers', ``loader`` and ``schedule`` those of a training script, ``accelerator`` an
    Accelerator on the CPU. A process group of one exists. Yields once; what is process-wide is undone afterwards.
    """
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, use_cache=False,
    ))  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 16, (16, 8))]
    args = TrainingArguments(str(folder / "args"), max_steps=2, use_cpu=True, report_to="none")
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters()))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    names: dict[str, Any] = {
        "model": model, "data": data, "args": args, "Trainer": Trainer, "schedule": schedule,
        "loader": torch.utils.data.DataLoader(data, batch_size=4), "accelerator": Accelerator(cpu=True),
    }  # fmt: skip
    try:
        yield names
    finally:
        names.clear()  # a DistributedDataParallel must not outlive its process group
        dist.destroy_process_group()
        AcceleratorState._reset_state(True)
