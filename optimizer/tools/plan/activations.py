"""An estimate of activation memory, for the one kind of layer there is a published formula for.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198, section 4: a
GPT layer (MLP of 4h, GELU, dropout) in 16 bits keeps ``sbh (10 + 24/t + 5as/(ht))`` bytes under t-way tensor
parallelism (their equation 2; equation 1 is t = 1), ``sbh (10 + 24/t)`` when the attention core is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCE = "arXiv 2205.05198, equations 1 and 2: GPT layers in 16 bits, whatever the model's own layers look like"


@dataclass(frozen=True)
class Activations:
    """Bytes per rank; an estimate.

    Attributes:
        stored: everything kept for the backward pass.
        selective: the attention core recomputed (also the size of things under a fused attention kernel).
        source: where the formula is from.
    """

    stored: int
    selective: int
    source: str = SOURCE


def estimate(config: Any, *, batch: int, seq: int, tp: int = 1) -> Activations:
    """Activations of all layers of a model, per rank.

    Args:
        config: transformers configuration (its text part is used where it has one).
        batch: sequences of one data-parallel rank's micro-batch.
        seq: tokens of a sequence.
        tp: tensor-parallel ranks.

    Raises:
        ValueError: a number below one; a configuration that does not say its sizes.
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
