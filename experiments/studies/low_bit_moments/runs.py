"""One training run with a given format of the first moments."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from experiments import data
from experiments.configs import TrainConfig
from experiments.models import LlamaConfig, build, lm_loss
from experiments.passes import validation_loss
from experiments.studies.low_bit_moments.candidates import Candidate, QuantisedMoment
from experiments.train import learning_rate
from optimizer import AdamMini, partition
from optimizer.step import moments
from optimizer.step.update import block_mean_square

CONFIG = TrainConfig(
    "low_bit_moments", LlamaConfig(hidden=416), data="enwik8", steps=1000, eval_every=100, eval_batches=64
)
EPS = 1e-8
Arm = str | Candidate
"""``fp32``, ``twin``, ``bf16``, ``int8`` and ``int4`` (as shipped), or a candidate."""


def name_of(arm: Arm) -> str:
    """Return an arm's name in results.

    The name of a shipped format contains all of its constants, so that a changed format is another arm.
    """
    if isinstance(arm, Candidate):
        return arm.name
    format = moments.FORMATS.get(arm)
    if format is None:
        return arm
    scale = "bf16" if format.scale_dtype == torch.bfloat16 else "fp32"
    return f"{arm}-square-stochastic-{format.block}-{scale} as shipped"


class _Plain:
    """A first moment in a floating-point dtype."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.value = torch.zeros(shape, dtype=dtype)

    def advance(self, grad: Tensor, beta1: float, step: int) -> Tensor:
        exact = self.value * beta1 + grad * (1 - beta1)
        self.value = exact.to(self.value.dtype)
        return exact


class _Shipped:
    """A first moment in a shipped format of ``optimizer.step.moments``."""

    def __init__(self, p: Tensor, format: moments.Format, seed: int) -> None:
        self.seed = seed
        self.state = moments.zero_state(p, format)

    def advance(self, grad: Tensor, beta1: float, step: int) -> Tensor:
        codes, scale = self.state["exp_avg"], self.state["exp_avg_scale"]
        return moments.advance(grad, codes, scale, beta1=beta1, maximize=False, step=step, seed=self.seed)


class Trainer:
    """Adam-mini with the arm's first moments, by the equations of ``optimizer.step.update``, tensor by tensor."""

    def __init__(self, model: nn.Module, arm: Arm, config: TrainConfig) -> None:
        self.config, self.taken = config, 0
        self.layouts = partition(model)
        decays = {
            id(p): g["weight_decay"]
            for g in AdamMini(model, weight_decay=config.weight_decay).param_groups
            for p in g["params"]
        }
        self.parameters = dict(model.named_parameters())
        self.decay = {name: decays[id(p)] for name, p in self.parameters.items()}
        self.second = {
            name: torch.zeros(self.layouts[name].aligned_shape(p.shape)) for name, p in self.parameters.items()
        }
        self.first = {name: _first_moment(p, arm, seed) for seed, (name, p) in enumerate(self.parameters.items())}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every tensor once."""
        self.taken += 1
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, p in self.parameters.items():
            assert p.grad is not None
            v = self.second[name]
            v.mul_(beta2).add_(block_mean_square(p.grad, self.layouts[name]), alpha=1 - beta2)
            factor = lr / (1 - beta1**self.taken) / ((v / (1 - beta2**self.taken)).sqrt() + EPS)
            move = self.first[name].advance(p.grad, beta1, self.taken)
            p.mul_(1 - lr * self.decay[name]).sub_(factor * move)


def _first_moment(p: Tensor, arm: Arm, seed: int) -> _Plain | _Shipped | QuantisedMoment:
    """Create a tensor's first moment in the arm's format; small tensors have fp32 moments under every arm."""
    if arm in ("fp32", "twin") or not moments.quantises(p.shape):
        return _Plain(p.shape, torch.float32)
    if isinstance(arm, Candidate):
        return QuantisedMoment(p.shape, arm, seed)
    return _Plain(p.shape, torch.bfloat16) if arm == "bf16" else _Shipped(p, moments.FORMATS[arm], seed)


def run(arm: Arm, seed: int, steps: int, lr: float = CONFIG.lr) -> dict[str, Any]:
    """Train once.

    Args:
        arm: format of the first moments.
        seed: seed of the initial weights and the data order.
        steps: number of optimizer steps.
        lr: peak learning rate.

    Returns:
        JSON-able: arm, seed, steps, curve of (step, validation loss) pairs, final_val_loss (None when it diverged),
        and seconds.
    """
    config = dataclasses.replace(CONFIG, seed=seed, steps=steps, lr=lr)
    model, corpus = build(config.model, seed), data.load(config.data)
    if arm == "twin":
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator))
    trainer = Trainer(model, arm, config)
    held_out = data.fixed_batches(corpus.validation, config.eval_batches, config.batch, config.seq_len)
    curve: list[tuple[int, float]] = []
    started = time.perf_counter()
    for step in range(steps):
        loss = lm_loss(model, data.batch_at(corpus.train, seed, step, config.batch, config.seq_len))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        trainer.step(learning_rate(config, step))
        model.zero_grad(set_to_none=True)
        last = step + 1 == steps
        if last or (step + 1) % config.eval_every == 0:
            curve.append((step + 1, validation_loss(model, held_out if last else held_out[::4])))
    final = curve[-1][1] if math.isfinite(curve[-1][1]) else None
    return {
        "arm": name_of(arm),
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "final_val_loss": final,
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 1),
    }
