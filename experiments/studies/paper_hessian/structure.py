"""Part ``structure``: how much of the Hessian lies in heads, rows and columns, along training and across models."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.data import Corpus, load, reduced
from experiments.models import GPTConfig, LlamaConfig, lm_loss
from experiments.studies.hessian_maps.settings import Settings as SubjectSettings
from experiments.studies.hessian_maps.subjects import Subject
from experiments.studies.paper_hessian.store import Cell, Part, settings_of
from hessian import HessianOperator, block_structure, dense
from hessian.parts import weight_parts

BASE = LlamaConfig(vocab=8, dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden=32)
STDLIB, ENWIK8 = "python-stdlib", "enwik8"


@dataclass(frozen=True)
class Variant:
    """A model with its data; each differs from ``base`` in one respect.

    Attributes:
        config: the model.
        batch: sequences per step, and in the batch of which the Hessian is taken.
        data: the corpus, reduced to eight classes of characters.
    """

    config: LlamaConfig | GPTConfig = BASE
    batch: int = 32
    data: str = STDLIB


VARIANTS: Mapping[str, Variant] = {
    "base": Variant(),
    "width 8": Variant(dataclasses.replace(BASE, dim=8, hidden=16)),
    "width 24": Variant(dataclasses.replace(BASE, dim=24, hidden=48)),
    "2 layers": Variant(dataclasses.replace(BASE, n_layers=2)),
    "2 heads": Variant(dataclasses.replace(BASE, n_heads=2, n_kv_heads=1)),
    "8 heads": Variant(dataclasses.replace(BASE, n_heads=8, n_kv_heads=4)),
    "batch 8": Variant(batch=8),
    "batch 128": Variant(batch=128),
    "enwik8": Variant(data=ENWIK8),
}
"""Width and feed-forward width change together; heads keep two query heads for each key-value head."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the part.

    Attributes:
        steps: training steps.
        seq_len: tokens per sequence.
        lr: peak learning rate.
        checkpoints: fractions of the training at which ``base`` is measured.
        ends: those at which the variants are.
        permutations: random partitions in the null.
        seeds: seeds of weights and batches.
        variants: names of ``VARIANTS``.
    """

    steps: int = 500
    seq_len: int = 16
    lr: float = 1e-2
    checkpoints: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
    ends: tuple[float, ...] = (0.0, 1.0)
    permutations: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)


PROFILES = {
    "full": Settings(),
    "smoke": Settings(steps=4, seq_len=4, checkpoints=(0.0, 1.0), permutations=4, seeds=(0,), variants=("width 8",)),
}


def part(profile: str) -> Part:
    """Return the part of a profile."""
    s = PROFILES[profile]
    cells = [
        Cell(f"{name}, seed {seed}", _seconds(s, name), lambda n=name, k=seed: measure(s, n, k))
        for name, seed in itertools.product(s.variants, s.seeds)
    ]
    return Part("structure", settings_of(s), cells)


def _checkpoints(settings: Settings, variant: str) -> tuple[float, ...]:
    return settings.checkpoints if variant == settings.variants[0] else settings.ends


def _seconds(settings: Settings, variant: str) -> float:
    """Return the planned time: training, and a Hessian of as many columns as the model has parameters."""
    config = VARIANTS[variant].config
    columns = {8: 800, 16: 2700, 24: 5700}[config.dim] * config.n_layers if isinstance(config, LlamaConfig) else 3800
    return 0.004 * settings.steps + len(_checkpoints(settings, variant)) * columns / 500


def corpus_of(data: str) -> Corpus:
    """Return a corpus reduced to eight classes of characters."""
    return reduced(load(data))


def measure(settings: Settings, variant: str, seed: int) -> list[dict[str, Any]]:
    """Train a variant and measure all its weight matrices at every checkpoint.

    Returns:
        One row per checkpoint, role and unit, medians over layers: ``z`` against random partitions of the same sizes,
        ``lift`` (mass inside the blocks divided by that of random ones, the diagonal left out) and ``matrices``.
    """
    chosen = VARIANTS[variant]
    subject = Subject(
        variant,
        chosen.config,
        corpus_of(chosen.data),
        SubjectSettings(steps=settings.steps, batch=chosen.batch, seq_len=settings.seq_len, lr=settings.lr, seed=seed),
    )
    checkpoints = _checkpoints(settings, variant)
    trained = subject.train("elementwise", settings.steps, seed, snapshots=checkpoints)
    rows = []
    for theta, checkpoint in zip(trained["theta"], checkpoints, strict=True):
        found = of_parameters(subject, theta, settings.permutations, seed)
        rows += [{"checkpoint": checkpoint, **row} for row in found]
    return [{**row, "final_loss": float(trained["loss"][-1])} for row in rows]


def of_parameters(subject: Subject, theta: np.ndarray, permutations: int, seed: int) -> list[dict[str, Any]]:
    """Return z and lift of every role and unit at some parameters, [n], medians over layers."""
    model = subject.model_at(theta)
    matrix = dense(HessianOperator(model, lm_loss, None, subject.fixed(1)))
    starts, start = {}, 0
    for name, parameter in model.named_parameters():
        starts[name] = start
        start += parameter.numel()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for weight in weight_parts(model):
        where = starts[weight.parameter] + weight.index.flatten()
        inner = matrix[where][:, where]
        for unit, ids in weight.candidates().items():
            if unit != "TENSOR":
                value = block_structure(inner, ids, permutations, seed)
                lift = value.mass_inside / value.expected if value.expected else float("nan")
                found.setdefault((weight.role.value, unit), []).append((value.z, lift))
    return [
        {
            "role": role,
            "unit": unit,
            "z": statistics.median(z for z, _ in values),
            "lift": statistics.median(lift for _, lift in values),
            "matrices": len(values),
        }
        for (role, unit), values in found.items()
    ]
