"""Estimate the memory of activations with the published formula for GPT layers.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198, section 4: a GPT
layer (MLP of width 4h, GELU, dropout) in 16 bits stores ``sbh (10 + 24/t + 5as/(ht))`` bytes for the backward pass, and
``sbh (10 + 24/t)`` bytes if the attention core is recomputed. This is their equation 2; equation 1 is the case t = 1.
Here s is the number of tokens of a sequence, b the micro-batch, h the hidden size, a the number of heads, and t the
number of tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCE = "arXiv 2205.05198, equations 1 and 2: GPT layers in 16 bits, whatever the model's own layers look like"


@dataclass(frozen=True)
class Activations:
    """Estimated bytes of activations per rank.

    Attributes:
        stored: bytes if all activations are stored for the backward pass.
        selective: bytes if the attention core is recomputed, which also applies to fused attention kernels.
        source: source of the formula.
    """

    stored: int
    selective: int
    source: str = SOURCE


def estimate(config: Any, *, batch: int, seq: int, tp: int = 1) -> Activations:
    """Estimate the activations of all layers of a model, per rank.

    Args:
        config: transformers configuration; its text configuration is used if it has one.
        batch: number of sequences in the micro-batch of one data-parallel rank.
        seq: number of tokens in a sequence.
        tp: number of tensor-parallel ranks.

    Raises:
        ValueError: ``batch`` or ``seq`` is below one, or the configuration has no hidden size or numbers of heads and
            layers.
    """
    for name, number in (("batch", batch), ("seq", seq)):
        if number < 1:
            raise ValueError(f"--{name} {number} must be >= 1")
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    sizes = [getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"--batch {batch}: the model has no configuration with hidden_size, num_attention_heads and "
            "num_hidden_layers, which the estimate is made from; leave out --batch and --seq"
        )
    hidden, heads, layers = (int(size) for size in sizes if size is not None)
    linear = seq * batch * hidden * (10 + 24 / tp)
    attention = 5 * heads * seq * seq * batch / tp
    return Activations(round(layers * (linear + attention)), round(layers * linear))
