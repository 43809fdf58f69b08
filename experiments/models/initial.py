"""Initial weights of the language models: scaled by each matrix's inputs, or one width for all as GPT-2 has it."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Init = Literal["fan_in", "gpt2"]
"""``fan_in``: normal with the standard deviation inputs^-1/2 (embeddings: width^-1/2). ``gpt2``: normal with 0.02
everywhere (Radford et al. 2019, and nanoGPT). Both divide the matrices that end a residual branch by sqrt(2 layers)."""
GPT2_STD = 0.02


def require_init(init: str) -> None:
    """Raise ValueError unless the name is one of ``Init``."""
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is unknown; choose from {get_args(Init)}")


def initialise(
    model: nn.Module,
    init: Init,
    *,
    width: int,
    layers: int,
    residual: tuple[str, ...],
    embeddings: tuple[str, ...],
) -> None:
    """Draw every matrix of a model, in the order of its parameters, and set biases to zero; norms keep their ones.

    Args:
        model: the model.
        init: how wide the weights are.
        width: the model's width.
        layers: its number of layers.
        residual: endings of the names of the matrices that end a residual branch.
        embeddings: names of the embeddings.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = (2 * layers) ** -0.5 if name.endswith(residual) else 1.0
            fan_in = width if name in embeddings else parameter.shape[1]
            nn.init.normal_(parameter, std=scale * (GPT2_STD if init == "gpt2" else fan_in**-0.5))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
