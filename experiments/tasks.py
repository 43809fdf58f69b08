"""What a run trains and how it is judged: the model, the loss of a step's batch, and the numbers on held-out data.

``experiments.train`` runs any task. Language models of this project are ``LanguageModelling``; the config of any other
model makes its own task (``experiments.workloads``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from experiments import data, passes
from experiments.models import MLPConfig, build, lm_loss

if TYPE_CHECKING:
    from experiments.configs import TrainConfig

Casting = Callable[[], AbstractContextManager[Any]]
Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What a run trains and how it is judged. A task may have the method of ``Shows`` too.

    A task that finds out that training has gone too far to mean anything returns a loss that is not a number, and says
    why in an attribute ``stopped``. The run has then diverged, its status has the reason, and its checkpoints stay.

    Attributes:
        model: the model, whose first weights are a function of the seed alone.
        fingerprint: hash of the data, sixteen hexadecimal digits or more.
    """

    model: nn.Module
    fingerprint: str

    def batch(self, step: int) -> Batch:
        """Return the global batch of a step, a function of (seed, step): tensors with one row per example."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over a batch's rows.

        Args:
            module: the module to call: the model, or what wraps it.
            batch: rows of a batch, on the model's device.
        """

    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the numbers on held-out data, ``val_loss`` first. Every process calls this.

        Args:
            rows: examples per forward pass; 0 for the task's own number.
            casting: returns the context of a forward pass.
        """


@runtime_checkable
class Shows(Protocol):
    """What a task has besides, if a run of it leaves more than numbers, such as samples of a generative model."""

    def artefacts(self, *, casting: Casting) -> dict[str, Any]:
        """Return what a finished run leaves: file name without ending -> JSON document of some kilobytes.

        It is called once, after the last record, by every process; the first one writes the files. It is a function of
        the weights alone, so it draws from generators of its own, and it leaves the weights as they are.

        Args:
            casting: returns the context of a forward pass.
        """


class Loop(Protocol):
    """One run from its newest checkpoint to its end. A library that trains by itself has a loop of its own."""

    def go(self) -> dict[str, Any]:
        """Train to the end, a divergence or a signal, and return the content of ``status.json``."""

    def clear(self) -> None:
        """Remove the checkpoints of a run that has ended."""


class LanguageModelling:
    """Next-token prediction on a corpus, by one of the models of ``experiments.models``.

    Args:
        config: the run.
        device: where held-out batches are kept.

    Raises:
        ValueError: the data has more tokens than the model's vocabulary, or is unknown.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.model = build(config.model, config.seed)
        self.corpus = data.load(config.data)
        self.fingerprint = self.corpus.fingerprint
        if self.corpus.vocab > config.model.vocab:
            raise ValueError(
                f"model.vocab={config.model.vocab} must be at least {self.corpus.vocab}, the tokens of "
                f"data={config.data!r}; increase it, or choose other data"
            )
        batches = data.fixed_batches(self.corpus.validation, config.eval_batches, config.batch, config.seq_len)
        is_mlp = isinstance(config.model, MLPConfig)
        batches = [(x, y[:, -1].contiguous()) for x, y in batches] if is_mlp else batches
        self.validation = [(x.to(device), y.to(device)) for x, y in batches]
        self._sample = data.context_batch_at if is_mlp else data.batch_at

    def batch(self, step: int) -> Batch:
        """Return (inputs, targets) of a step."""
        config = self.config
        return self._sample(self.corpus.train, config.seed, step, config.batch, config.seq_len)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy in nats."""
        inputs, targets = batch
        return lm_loss(module, (inputs, targets))

    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the mean cross entropy over the held-out batches, in nats."""
        return {"val_loss": passes.validation_loss(self.model, self.validation, rows=rows, casting=casting)}
