"""A GPT-2 with nanoGPT's parameter names: learned positions, a fused query-key-value projection, and GELU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.fields import ADDED

from .initial import Init, initialise, require_init
from .recomputing import through


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the feed-forward width is four times ``n_embd``.

    ``bias`` is for all linear layers and norms, and ``init`` is explained in ``models.initial``.
    """

    vocab: int = 256
    block_size: int = 128
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    tied: bool = False
    bias: bool = field(default=True, metadata=ADDED)
    init: Init = field(default="fan_in", metadata=ADDED)

    def require_consistent(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: the number of heads does not divide the width, or ``init`` is unknown.
        """
        require_init(self.init)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")


class CausalSelfAttention(nn.Module):
    """Causal attention with one fused projection [Q|K|V]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, n_embd] to [B, T, n_embd]."""
        batch, length, dim = x.shape
        q, k, v = (t.view(batch, length, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(dim, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    """Feed-forward block, four times as wide as the model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, n_embd] to [B, T, n_embd]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd, bias=config.bias), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd, bias=config.bias), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, n_embd] to [B, T, n_embd]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only language model; the output layer is tied to the embedding if ``tied`` is set."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        config.require_consistent()
        self.config, self.recompute = config, False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab, bias=False)
        initialise(
            self,
            config.init,
            width=config.n_embd,
            layers=config.n_layer,
            residual=("c_proj.weight",),
            embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        )
        if config.tied:
            self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 [B, T] with T <= block_size, to logits [B, T, vocab]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = through(block, x, recompute=self.recompute)
        return self.lm_head(self.transformer["ln_f"](x))
