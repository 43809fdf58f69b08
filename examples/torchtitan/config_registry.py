"""torchtitan's debug models with AdamMini, trained on the sources of Python's standard library.

On CPUs:

    torchrun --nproc-per-node 2 -m examples.torchtitan.train --module examples.torchtitan --config llama3_processors

With accelerators (not tested in this repository):

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
    """Set AdamMini as the optimizer, and the standard library's sources as the data."""
    config.optimizer = default_adam_mini(lr=8e-4, strict=True)
    config.dataloader.dataset = register()
    config.hf_assets_path = tokenizer(_TOKENIZER, size=2_000)  # below the debug models' 2,048
    config.dump_folder = "out/torchtitan"
    return config


def llama3() -> Trainer.Config:
    """Return the config of the Llama 3 debug model: 6 layers, 16 heads, fused query, key and value projections."""
    return _with_adam_mini(llama3_debugmodel())


def llama3_processors() -> Trainer.Config:
    """Return the config of the Llama 3 debug model on CPUs."""
    return for_processors(llama3())


def deepseek_v3_processors() -> Trainer.Config:
    """Return the config of the DeepSeek V3 debug model, with latent attention and experts, on CPUs."""
    return for_processors(_with_adam_mini(deepseek_v3_debugmodel()))
