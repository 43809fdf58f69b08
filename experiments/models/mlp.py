"""A one-hidden-layer classifier: which character comes next, from the k before it as one-hot vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of the classifier: ``context`` characters in, ``hidden`` neurons, ``vocab`` classes out."""

    vocab: int = 8
    context: int = 8
    hidden: int = 8

    def require_consistent(self) -> None:
        """Nothing: any sizes go together."""


class MLPClassifier(nn.Module):
    """Linear, tanh, Linear on the one-hot context."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.context * config.vocab, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.vocab)

    def forward(self, context: Tensor) -> Tensor:
        """int64 [B, context] -> logits [B, vocab]."""
        one_hot = F.one_hot(context, self.config.vocab).flatten(1).to(self.fc1.weight.dtype)
        return self.fc2(F.tanh(self.fc1(one_hot)))
