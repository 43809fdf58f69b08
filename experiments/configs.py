"""Complete configurations as functions; variants are a base with a few fields replaced."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.models import GPTConfig, LlamaConfig, MLPConfig, ModelConfig
from experiments.optimizers import ADAMW, CONTROL
from optimizer import Rules

FORMAT_VERSION = 1
"""Of a results folder; raised whenever the meaning of its files changes."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run, whole. Two runs with equal configs give equal results.

    Attributes:
        experiment: folder the run belongs to, below the results root.
        model: sizes of the model; its class follows from the config's.
        data: corpus name (``experiments.data.load``).
        arm: a rule set (name or path), ``permuted`` or ``torch_adamw``.
        rules_hash: of the arm's rules at the time of the run; filled in by ``with_rules_hash``.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: decoupled.
        clip: gradient norm limit; 0 for none.
        warmup: share of the steps with linearly rising learning rate; then it falls linearly to 0.
        batch: sequences per step, over all processes.
        seq_len: tokens per sequence.
        steps: optimizer steps.
        eval_every: steps between validation losses.
        eval_batches: fixed validation batches of ``batch`` sequences.
        checkpoint_every: steps between checkpoints; 0 for none.
        seed: of the initial weights, the data order and the control's shuffle.
    """

    experiment: str
    model: ModelConfig
    data: str = "python-stdlib"
    arm: str = "adam_mini"
    rules_hash: str = ""
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.1
    batch: int = 16
    seq_len: int = 64
    steps: int = 500
    eval_every: int = 50
    eval_batches: int = 16
    checkpoint_every: int = 100
    seed: int = 0
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        for name in ("batch", "seq_len", "steps", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, at least 0")
        for name, size in vars(self.model).items():
            if not isinstance(size, bool) and not 0 < size < math.inf:
                raise ValueError(f"model.{name}={size} must be greater than 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the model's class."""
        return {**dataclasses.asdict(self), "model": {"kind": type(self.model).__name__, **vars(self.model)}}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format version.
        """
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"this config has format_version={document.get('format_version')}, this release writes "
                f"{FORMAT_VERSION}; use the release that wrote it, or another results folder"
            )
        kinds = {kind.__name__: kind for kind in (GPTConfig, LlamaConfig, MLPConfig)}
        sizes = dict(document["model"])
        return cls(**{**document, "model": kinds[sizes.pop("kind")](**sizes)})

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the config's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def with_rules_hash(self) -> TrainConfig:
        """The config with the content of its rules folded in, so that changed rules make another run."""
        if self.arm in (CONTROL, ADAMW):
            return self
        rules = Rules.load(self.arm)
        content: dict[str, object] = {role.value: unit.value for role, unit in rules.units.items()}
        if rules.overrides:  # only then, so that runs from before there were any keep their hashes
            content["overrides"] = [[override.pattern, override.unit.value] for override in rules.overrides]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return dataclasses.replace(self, rules_hash=digest)


def tiny_gpt() -> TrainConfig:
    """The paper's tiny Transformer in GPT style: small enough for an exact Hessian."""
    model = GPTConfig(vocab=8, block_size=16, n_embd=16, n_layer=1, n_head=4)
    return TrainConfig("tiny_gpt", model, data="python-stdlib-8", batch=32, seq_len=16, steps=2000, eval_every=200)


def tiny_llama() -> TrainConfig:
    """The same in Llama style, with grouped heads."""
    model = LlamaConfig(vocab=8, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=32)
    return TrainConfig("tiny_llama", model, data="python-stdlib-8", batch=32, seq_len=16, steps=2000, eval_every=200)


def byte_llama() -> TrainConfig:
    """A 0.85M-parameter byte-level Llama: the CPU ablation's model."""
    return TrainConfig("byte_llama", LlamaConfig(), batch=16, seq_len=64, steps=400)


def smoke() -> TrainConfig:
    """A run of seconds: the same code, nothing to learn from."""
    model = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden=48)
    return TrainConfig(
        "smoke", model, batch=4, seq_len=32, steps=20, eval_every=10, eval_batches=2, checkpoint_every=10
    )


CONFIGS: dict[str, Callable[[], TrainConfig]] = {
    "tiny-gpt": tiny_gpt, "tiny-llama": tiny_llama, "byte-llama": byte_llama, "smoke": smoke,
}  # fmt: skip
