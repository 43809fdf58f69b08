"""torchtitan's debug models with AdamMini, on the sources of Python's standard library.

On processors:

    torchrun --nproc-per-node 2 -m examples.torchtitan.train --module examples.torchtitan --config llama3_processors

With accelerators (not run here):

    torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan --config llama3
"""

from __future__ import annotations

from pathlib import Path

from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from optimizer.wrappers.torchtitan import default_adam_mini

from .cpu import for_processors
from .sources import register, tokenizer

_TOKENIZER = Path("out/torchtitan/tokenizer")


def _with_adam_mini(config: Trainer.Config) -> Trainer.Config:
    """The two lines this is about, and the text."""
    config.optimizer = default_adam_mini(lr=8e-4, strict=True)
    config.dataloader.dataset = register()
    config.hf_assets_path = tokenizer(_TOKENIZER, size=2_000)  # the debug models have 2,048
    config.dump_folder = "out/torchtitan"
    return config


def llama3() -> Trainer.Config:
    """The Llama 3 debug model: 6 layers, 16 heads, fused query, key and value projections."""
    return _with_adam_mini(llama3_debugmodel())


def llama3_processors() -> Trainer.Config:
    """The same on processors."""
    return for_processors(llama3())


def deepseek_v3_processors() -> Trainer.Config:
    """The DeepSeek V3 debug model, latent attention and experts, on processors."""
    return for_processors(_with_adam_mini(deepseek_v3_debugmodel()))
