"""Train the tiny models of the study, and rebuild them from saved parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data import Corpus, batch_at, context_batch_at, fixed_batches
from experiments.models import MLPConfig, ModelConfig, build, lm_loss
from experiments.studies.hessian_maps.cache import Arrays
from experiments.studies.hessian_maps.progress import Progress
from experiments.studies.hessian_maps.settings import Settings
from optimizer import AdamMini

Batch = tuple[Tensor, Tensor]


class Subject:
    """One of the study's models with its training data.

    Args:
        name: name of the model in the study.
        config: configuration of the model.
        corpus: text to train on.
        settings: settings of the study.
    """

    def __init__(self, name: str, config: ModelConfig, corpus: Corpus, settings: Settings) -> None:
        self.name, self.config, self.corpus, self.settings = name, config, corpus, settings
        self.is_mlp = isinstance(config, MLPConfig)
        self.length = config.context if isinstance(config, MLPConfig) else settings.seq_len
        self.rows = settings.batch * (
            8 if self.is_mlp else 1
        )  # The MLP predicts one token per row, so it needs more rows.

    def train_batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step."""
        sample = context_batch_at if self.is_mlp else batch_at
        return sample(self.corpus.train, seed, step, self.rows, self.length)

    def fixed(self, count: int, *, held_out: bool = False) -> list[Batch]:
        """Return ``count`` fixed batches, evenly spaced over the training or the held-out text."""
        tokens = self.corpus.validation if held_out else self.corpus.train
        batches = fixed_batches(tokens, count, self.rows, self.length)
        return [(x, y[:, -1].contiguous()) for x, y in batches] if self.is_mlp else batches

    def train(
        self,
        rules: str | Path,
        steps: int,
        seed: int,
        *,
        progress: Progress | None = None,
        snapshots: Sequence[float] = (),
    ) -> Arrays:
        """Train the model from its initial parameters and record the held-out loss about 20 times.

        Args:
            rules: rules of the optimizer: name of a shipped set or path of a rules file.
            steps: number of training steps.
            seed: seed of the initial parameters and of the batches.
            progress: called as the training advances.
            snapshots: fractions of the training, ascending, after which the parameters are returned; the first is 0.

        Returns:
            ``loss_step`` and ``loss``, both [number of recorded losses], and, with ``snapshots``, the flat parameters
            ``theta`` [snapshots, n].
        """
        model = build(self.config, seed)
        optimizer = AdamMini(model, lr=self.settings.lr, betas=(0.9, 0.95), weight_decay=0.1, rules=rules)
        held_out = self.fixed(8, held_out=True)
        loss_steps, losses, saved_parameters = [], [], [_flat(model)]
        snapshot_steps = [round(fraction * steps) for fraction in snapshots[1:]]
        for step in range(steps):
            warmup = max(1, steps // 10)
            lr = self.settings.lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            lm_loss(model, self.train_batch(seed, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) in snapshot_steps:
                saved_parameters.append(_flat(model))
            if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
                with torch.no_grad():
                    losses.append(sum(lm_loss(model, b).item() for b in held_out) / len(held_out))
                loss_steps.append(step + 1)
            if progress is not None and (step + 1) % 20 == 0:
                progress(step + 1, steps, "training")
        out: Arrays = {"loss_step": np.array(loss_steps), "loss": np.array(losses)}
        return {**out, "theta": np.stack(saved_parameters)} if snapshots else out

    def model_at(self, theta: np.ndarray) -> nn.Module:
        """Return the model in float64 and eval mode with these flat parameters, [n]."""
        model = build(self.config, self.settings.seed).double()
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.from_numpy(theta).double(), model.parameters())
        return model.eval()

    def mean_square_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return parameter name -> mean squared gradient over fixed mini-batches of the training text."""
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        count = self.settings.gradient_batches
        for step in range(count):
            loss = lm_loss(model, self.train_batch(self.settings.seed + 10_000, step))
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for total, g in zip(sums.values(), grads, strict=True):
                total.add_(g.square(), alpha=1 / count)
        return sums


def _flat(model: nn.Module) -> np.ndarray:
    """Return a copy of all parameters as one flat array."""
    flat: np.ndarray = nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
    return flat
