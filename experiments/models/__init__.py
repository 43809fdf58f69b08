"""Small models without dropout, initialised from an explicit seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .mlp import MLPClassifier, MLPConfig

ModelConfig = GPTConfig | LlamaConfig | MLPConfig

__all__ = ["GPT", "GPTConfig", "Llama", "LlamaConfig", "MLPClassifier", "MLPConfig", "ModelConfig", "build", "lm_loss"]


def build(config: ModelConfig, seed: int) -> nn.Module:
    """Build the model of a config; its weights are a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, LlamaConfig):
            return Llama(config)
        return GPT(config) if isinstance(config, GPTConfig) else MLPClassifier(config)


def lm_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the mean cross entropy in nats over all positions.

    Args:
        model: inputs -> logits.
        batch: (inputs, targets), int64 [B, T] each, or [B, k] and [B] for a classifier.
    """
    inputs, targets = batch
    logits = model(inputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16-bit logits round the loss to 3 digits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
