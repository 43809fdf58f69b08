"""The forward passes of a verification, with inputs of the user or guessed inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 4
"""Positions of a guessed sequence. Two would suffice; more also reveal causal masks and attention windows."""


@dataclass
class Forward:
    """One forward pass to run.

    Attributes:
        name: description of the forward pass for the report.
        module: the module to call: the model or a part of it, for example a vision tower.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> str | None:
        """Call the module and return a description of the error it raised, or None.

        Outputs that were recorded before an error are still used as evidence.
        """
        try:
            self.module(*self.args, **self.kwargs)
        except TimeoutError:
            raise
        except Exception as error:  # A model can fail on a guessed input with any exception.
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        return None


def forwards_of(model: nn.Module, inputs: Any, seed: int) -> Iterator[Forward]:
    """Yield forward passes with the user's inputs, or with guessed inputs if ``inputs`` is None."""
    if inputs is not None:
        for i, arguments in enumerate(inputs if isinstance(inputs, list) else [inputs]):
            name = f"inputs {i}"
            if isinstance(arguments, dict):
                yield Forward(name, model, (), arguments)
            else:
                yield Forward(name, model, arguments if isinstance(arguments, tuple) else (arguments,))
        return
    generator = torch.Generator().manual_seed(seed)
    if type(model).__module__.startswith("transformers."):
        from .transformers_inputs import guesses

        yield from guesses(model, generator)
        return
    for args in _plain_guesses(model, generator):
        yield Forward(", ".join(f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')}" for a in args), model, args)


def _plain_guesses(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Yield arguments: token ids for an embedding, vectors for a first linear layer, images for a first convolution."""
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    times = max(1, len(required))
    first = next(
        (
            m
            for m in model.modules()
            if isinstance(m, (nn.Embedding, nn.Linear, nn.MultiheadAttention, nn.modules.conv._ConvNd))
        ),
        None,
    )
    joint = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is not None and not isinstance(first, nn.modules.conv._ConvNd):
        ids = torch.randint(0, embedding.num_embeddings, (1, LENGTH), generator=generator)
        yield (ids,) * times
    width = first.in_features if isinstance(first, nn.Linear) else joint.embed_dim if joint is not None else None
    if width is not None:
        shape = (1, LENGTH, width) if joint is None or joint.batch_first else (LENGTH, 1, width)
        x = torch.randn(shape, generator=generator)
        if isinstance(model, nn.MultiheadAttention):
            yield tuple(torch.randn((*shape[:-1], n), generator=generator) for n in (width, model.kdim, model.vdim))
        else:
            yield (x,) * times
    if isinstance(first, nn.Conv2d):
        configured = getattr(model, "default_cfg", None) or {}
        size = getattr(model, "img_size", None) or configured.get("input_size", (3, 32, 32))[-1]
        size = size if isinstance(size, int) else size[0]
        yield (torch.randn((1, first.in_channels, size, size), generator=generator),)
