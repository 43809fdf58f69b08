"""Functions that return complete configurations; a variant is a base configuration with a few fields replaced."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args

import tyro

from experiments.fields import ADDED, document_of, require_keys
from experiments.models import GPTConfig, LlamaConfig, MLPConfig, ModelConfig
from experiments.optimizers import ADAMW, CONTROL, EPS, VARIANTS, load_rules
from experiments.rivals import RIVALS
from experiments.workloads import KINDS, WORKLOADS

FORMAT_VERSION = 1
"""Version of the format of a results folder; it increases whenever the meaning of a file changes."""
MOST_SEEDS = 2**63
"""Seeds must be below this value, which is the limit of torch's generators."""
Trained: TypeAlias = Union[(ModelConfig, *KINDS)]
"""Sizes of a language model of this project, or the config of what a workload trains."""
Precision = Literal["fp32", "bf16"]
Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class TrainConfig:
    """The complete configuration of one training run. Two runs with equal configs give equal results.

    Attributes:
        experiment: name of the run's folder below the results root.
        model: sizes of the model; the type of this config determines the model's class, and what is trained.
        data: name of the corpus, as in ``experiments.data.load``, or of a workload's data.
        arm: a rule set (name or path), ``permuted``, ``torch_adamw``, ``adam_mini_`` with a statistic of blocks, or a
            rival (docs/rivals.md).
        rules_hash: hash of the arm's rules at the time of the run; ``with_rules_hash`` fills it in.
        lr: peak learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        weight_decay: decoupled weight decay.
        clip: limit of the gradient norm; 0 for no limit.
        warmup: share of the steps over which the learning rate rises linearly; then it falls.
        batch: sequences or other examples per step, over all processes.
        seq_len: tokens per sequence; 1 if examples are no sequences.
        steps: number of optimizer steps.
        eval_every: steps between validation losses; the last step always has one.
        eval_batches: number of fixed validation batches of ``batch`` sequences.
        checkpoint_every: steps between checkpoints; 0 for no checkpoints.
        seed: seed of the initial weights, the data order and the control's shuffle.
        precision: ``bf16`` computes matrix products in bf16 (autocast; under FSDP2 its mixed precision). Parameters,
            gradients that are reduced, and optimizer state are fp32 either way.
        decay: how the learning rate falls after the warm-up: ``linear`` or ``cosine``.
        lr_end: where it falls to, as a share of ``lr``, in [0, 1).
        eps: added to the root of the second moment, for AdamW and rule sets.
    """

    experiment: str
    model: Trained
    data: str = "python-stdlib"
    arm: str = "adam_mini"
    rules_hash: Annotated[str, tyro.conf.Suppress] = ""
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
    format_version: Annotated[int, tyro.conf.Suppress] = field(default=FORMAT_VERSION)
    precision: Precision = field(default="fp32", metadata=ADDED)
    decay: Decay = field(default="linear", metadata=ADDED)
    lr_end: float = field(default=0.0, metadata=ADDED)
    eps: float = field(default=EPS, metadata=ADDED)

    def __post_init__(self) -> None:
        if not self.experiment or Path(self.experiment).name != self.experiment or self.experiment.startswith("."):
            raise ValueError(f"experiment={self.experiment!r} must be the name of one folder, such as 'smoke'")
        for name in ("batch", "seq_len", "steps", "eval_every", "eval_batches"):
            if _whole(name, getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("checkpoint_every", "seed"):
            if _whole(name, getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.seed >= MOST_SEEDS:
            raise ValueError(f"seed={self.seed} must be less than 2**63, the limit of torch's generators")
        for name, choices in (("precision", get_args(Precision)), ("decay", get_args(Decay))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {choices}")
        for name in ("warmup", "beta1", "beta2", "lr_end"):
            if not 0 <= _number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("lr", "weight_decay", "clip", "eps"):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, at least 0")
        self._require_sizes()

    def _require_sizes(self) -> None:
        """Check the model's sizes one by one, against each other, and against the length of a sequence."""
        for name, size in () if isinstance(self.model, KINDS) else vars(self.model).items():
            if isinstance(getattr(type(self.model), name), bool):
                if not isinstance(size, bool):
                    raise ValueError(f"model.{name}={size!r} must be true or false")
            elif not isinstance(getattr(type(self.model), name), str):  # require_consistent checks words
                check = _number if isinstance(getattr(type(self.model), name), float) else _whole
                if not 0 < check(f"model.{name}", size) < math.inf:
                    raise ValueError(f"model.{name}={size} must be greater than 0")
        try:
            self.model.require_consistent()
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        if isinstance(self.model, GPTConfig) and self.seq_len > self.model.block_size:
            raise ValueError(
                f"seq_len={self.seq_len} must be at most model.block_size={self.model.block_size}, the model's "
                "number of positions"
            )
        if isinstance(self.model, MLPConfig) and self.seq_len != self.model.context:
            raise ValueError(
                f"seq_len={self.seq_len} must be model.context={self.model.context}, the model's input length"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a JSON-able dict that includes the name of the model's config class."""
        return {**document_of(self), "model": {"kind": type(self.model).__name__, **document_of(self.model)}}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> TrainConfig:
        """Build a config from a dict that ``to_dict`` returned.

        Raises:
            ValueError: the format version differs, a key is unknown or missing, or a value is out of range.
        """
        if not isinstance(document, Mapping):
            raise ValueError(f"a config must be a JSON object, not a {type(document).__name__}")
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"this config has format_version={document.get('format_version')}, this release writes "
                f"{FORMAT_VERSION}; use the release that wrote it, or another results folder"
            )
        require_keys("config", document, cls)
        kinds = {kind.__name__: kind for kind in (GPTConfig, LlamaConfig, MLPConfig, *KINDS)}
        sizes = document["model"]
        if not isinstance(sizes, Mapping) or sizes.get("kind") not in kinds:
            raise ValueError(f"model={sizes!r} must be an object whose kind is one of {sorted(kinds)}")
        kind = kinds[sizes["kind"]]
        require_keys("model", sizes, kind, more=("kind",))
        return cls(**{**document, "model": kind(**{name: size for name, size in sizes.items() if name != "kind"})})

    @property
    def hash(self) -> str:
        """Hash of the config's content, twelve hexadecimal digits; it names the run's folder."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def with_rules_hash(self) -> TrainConfig:
        """Return the config with the hash of its arm's rules, so that changed rules give another run.

        An arm without rules, such as a rival, has no hash.

        Raises:
            ValueError: the arm is unknown.
        """
        if self.arm in (CONTROL, ADAMW, *VARIANTS, *RIVALS):
            return self
        rules = load_rules(self.arm)
        content: dict[str, object] = {role.value: unit.value for role, unit in rules.units.items()}
        if rules.overrides:  # Rules without overrides keep the hash that they had before overrides existed.
            content["overrides"] = [[override.pattern, override.unit.value] for override in rules.overrides]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return dataclasses.replace(self, rules_hash=digest)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a whole number")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number")
    return value


def tiny_gpt() -> TrainConfig:
    """A tiny Transformer in GPT style as in the Adam-mini paper, small enough for an exact Hessian."""
    model = GPTConfig(vocab=8, block_size=16, n_embd=16, n_layer=1, n_head=4)
    return TrainConfig("tiny_gpt", model, data="python-stdlib-8", batch=32, seq_len=16, steps=2000, eval_every=200)


def tiny_llama() -> TrainConfig:
    """A tiny Transformer in Llama style with grouped heads, small enough for an exact Hessian."""
    model = LlamaConfig(vocab=8, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=32)
    return TrainConfig("tiny_llama", model, data="python-stdlib-8", batch=32, seq_len=16, steps=2000, eval_every=200)


def byte_llama() -> TrainConfig:
    """A byte-level Llama of 0.85M parameters, the model of the CPU ablation."""
    return TrainConfig("byte_llama", LlamaConfig(), batch=16, seq_len=64, steps=400)


def byte_gpt() -> TrainConfig:
    """A byte-level GPT of 0.86M parameters on enwik8: another architecture and corpus than the ablation's."""
    return TrainConfig("byte_gpt", GPTConfig(block_size=64), data="enwik8", batch=16, seq_len=64, steps=400)


def smoke() -> TrainConfig:
    """A run of a few seconds that only tests the code."""
    model = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden=48)
    return TrainConfig(
        "smoke", model, batch=4, seq_len=32, steps=20, eval_every=10, eval_batches=2, checkpoint_every=10
    )


CONFIGS: dict[str, Callable[[], TrainConfig]] = {
    "tiny-gpt": tiny_gpt,
    "tiny-llama": tiny_llama,
    "byte-llama": byte_llama,
    "byte-gpt": byte_gpt,
    "smoke": smoke,
}


def of_workloads() -> dict[str, TrainConfig]:
    """Return the configs of workloads: ``gcn`` as in its study, ``gcn-smoke``, and ``gcn-ogbn-arxiv`` at full size."""
    found = {}
    for name, workload in WORKLOADS.items():
        sizes = {"smoke": workload.smoke, **workload.full}
        named = {name: {}, **{f"{name}-{size}": fields for size, fields in sizes.items()}}
        middle = {"lr": workload.rates[len(workload.rates) // 2]}
        found |= {
            key: TrainConfig(f"single_{key.replace('-', '_')}", **{**middle, **workload.run, **named[key]})
            for key in named
        }
    return found
