"""A classifier with one hidden layer that predicts the next character from one-hot vectors of the preceding ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of the classifier: ``context`` input characters, ``hidden`` neurons, and ``vocab`` classes."""

    vocab: int = 8
    context: int = 8
    hidden: int = 8

    def require_consistent(self) -> None:
        """Check nothing, because all sizes are compatible. The other model configs have this method, too."""


class MLPClassifier(nn.Module):
    """Linear, tanh and Linear layers on the one-hot context."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.context * config.vocab, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.vocab)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts, int64 [B, context], to logits [B, vocab]."""
        one_hot = F.one_hot(context, self.config.vocab).flatten(1).to(self.fc1.weight.dtype)
        return self.fc2(F.tanh(self.fc1(one_hot)))
