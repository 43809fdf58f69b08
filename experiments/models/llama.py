"""A Llama with Meta's and torchtitan's parameter names: RMSNorm, rotary positions, grouped heads, and SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.fields import ADDED

from .initial import Init, initialise, require_init
from .recomputing import through


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; ``hidden`` is the feed-forward width, and ``init`` is explained in ``models.initial``."""

    vocab: int = 256
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden: int = 384
    rope_base: float = 10_000.0
    init: Init = field(default="fan_in", metadata=ADDED)

    def require_consistent(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: n_heads does not divide dim, n_kv_heads does not divide n_heads, a head has an odd width, whose
                channels rotary positions cannot pair, or ``init`` is unknown.
        """
        require_init(self.init)
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of n_heads={self.n_heads}, and that a multiple of "
                f"n_kv_heads={self.n_kv_heads}"
            )
        if self.dim // self.n_heads % 2:
            raise ValueError(
                f"dim={self.dim} / n_heads={self.n_heads} = {self.dim // self.n_heads} must be even: rotary positions "
                "rotate pairs of channels"
            )


def rotary(x: Tensor, base: float) -> Tensor:
    """Rotate pairs (first half, second half) of head channels by position; x is [B, heads, T, head_dim].

    16-bit channels are rotated in fp32, because 16 bits do not hold the cosine of an angle.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=x.device), frequency)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x[..., :half].to(wide), x[..., half:].to(wide)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation: x / rms(x) * weight; 16-bit inputs are normalised in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with ``n_kv_heads`` shared key-value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.dim // config.n_heads
        self.rope_base = config.rope_base
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, dim] to [B, T, dim]."""
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotary(q, self.rope_base), rotary(k, self.rope_base)
        group = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, dim] to [B, T, dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, dim] to [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Decoder-only language model; the output layer is not tied to the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        config.require_consistent()
        self.config, self.recompute = config, False
        self.tok_embeddings = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab, bias=False)
        initialise(
            self,
            config.init,
            width=config.dim,
            layers=config.n_layers,
            residual=("wo.weight", "w2.weight"),
            embeddings=("tok_embeddings.weight",),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 [B, T], to logits [B, T, vocab]."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = through(layer, x, recompute=self.recompute)
        return self.output(self.norm(x))
