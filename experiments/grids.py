"""Grids of training runs: which runs a study consists of. docs/protocol.md says why these runs.

A new study is one line in ``STUDIES``. Its results are in ``results/<study>_<profile>``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.configs import TrainConfig, byte_gpt, byte_llama, smoke
from experiments.models import GPTConfig, Llama, LlamaConfig
from experiments.optimizers import VARIANTS
from experiments.rivals import RIVALS
from experiments.workloads import WORKLOADS, Workload

ARMS = (
    "elementwise",
    "adam_mini",
    "short_run",
    "pytorch_default",
    "slim_adam",
    "derived_blocks",
    "derived",
    "factored",
    "permuted",
)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
EIGHT = tuple(range(8))
PLAIN: Mapping[str, Mapping[str, Any]] = {"": {}}
_UNNAMED = {"experiment", "arm", "lr", "seed", "rules_hash", "eval_every", "checkpoint_every"}


@dataclass(frozen=True)
class Study:
    """A grid of training runs.

    Attributes:
        base: function that returns the config that all runs share.
        arms: its arms.
        rates: its learning rates.
        seeds: its seeds.
        own: arm -> learning rates in place of ``rates``, for arms whose rates are of another size.
        grown: arm -> rates by which its grid grew, because its best rate was the last one in that direction.
        settings: name -> fields of the config that differ from the base. Every arm runs in every setting.
        more: seeds of each arm's best rate alone, once the grid has told which it is (``experiments.growing``).
        grows: whether a grid grows until its best rate lies inside.
        shares: studies from which the results of equal runs are taken over.
        small: function that returns the config of the profile ``smoke``.
    """

    base: Callable[[], TrainConfig]
    arms: tuple[str, ...] = ARMS
    rates: tuple[float, ...] = LEARNING_RATES
    seeds: tuple[int, ...] = SEEDS
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    grown: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: PLAIN)
    more: tuple[int, ...] = ()
    grows: bool = False
    shares: tuple[str, ...] = ()
    small: Callable[[], TrainConfig] = smoke

    def runs(self, arms: Sequence[str]) -> list[tuple[int, str, float, str]]:
        """Return (seed, setting, learning rate, arm) of every run, seed by seed.

        An interrupted study therefore has similar numbers of runs of everything that it compares.
        """
        pairs = [(lr, arm) for lr, arm in itertools.product(self.rates, arms) if arm not in self.own]
        pairs += [(lr, arm) for arm in arms for lr in self.own.get(arm, ())]
        grown = [(lr, arm) for arm in arms for lr in self.grown.get(arm, ())]
        wanted = [(seed, name, lr, arm) for seed in self.seeds for name in self.settings for lr, arm in pairs]
        wanted += [(seed, name, lr, arm) for seed in self.seeds for name in self.settings for lr, arm in grown]
        return wanted


def _places() -> dict[str, dict[str, Any]]:
    """Return two architectures on two corpora."""
    models = {"llama": LlamaConfig(), "gpt": GPTConfig(block_size=64)}
    corpora = {"stdlib": "python-stdlib", "enwik8": "enwik8"}
    return {
        f"{model}, {corpus}": {"model": models[model], "data": corpora[corpus]}
        for model, corpus in itertools.product(models, corpora)
    }


def small_llama() -> TrainConfig:
    """A byte-level Llama of 0.13M parameters, for maps of many runs."""
    model = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden=192)
    return TrainConfig("small_llama", model, batch=16, seq_len=64, steps=300, eval_every=100)


MODELS_BY_SIZE = {
    "0.13M": LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden=192),
    "0.3M": LlamaConfig(dim=96, n_layers=2, n_heads=6, n_kv_heads=3, hidden=288),
    "0.85M": LlamaConfig(),
    "3M": LlamaConfig(dim=224, n_layers=5, n_heads=7, n_kv_heads=7, hidden=608),
}
RATIOS = {"0.13M": (1, 5, 20, 80, 160), "0.3M": (1, 5, 20), "0.85M": (1, 5), "3M": (1,)}
"""Tokens per parameter; 20 is about the optimum of Chinchilla's law (Hoffmann et al., arXiv 2203.15556)."""


def _lengths() -> dict[str, dict[str, Any]]:
    """Return sizes and lengths: steps of 1,024 tokens that give the wanted number of tokens per parameter."""
    settings = {}
    for size, model in MODELS_BY_SIZE.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Llama(model).parameters())
        for ratio in RATIOS[size]:
            steps = max(1, round(ratio * parameters / 1024))
            settings[f"{size}, {ratio} tokens per parameter"] = {
                "model": model,
                "steps": steps,
                "eval_every": max(1, steps // 8),
                "checkpoint_every": max(100, steps // 8),
            }
    return settings


SENSITIVITY: dict[str, tuple[float, ...]] = {
    "beta1": (0.8, 0.95),
    "beta2": (0.9, 0.99, 0.999),
    "eps": (1e-10, 1e-6, 1e-4),
    "weight_decay": (0.0, 0.01, 0.3, 1.0),
}
"""Hyper-parameter -> values besides its default. One is changed at a time."""


def _one_changed() -> dict[str, dict[str, Any]]:
    changed = {f"{name} {value:g}": {name: value} for name, values in SENSITIVITY.items() for value in values}
    return {"defaults": {}, **changed}


def of_workload(name: str, workload: Workload) -> Study:
    """Return the study of a workload: its grid on seed 0, and the best rate of every arm on seeds 1 and 2."""
    base = functools.partial(TrainConfig, name, **workload.run)
    return Study(
        base,
        workload.arms,
        workload.rates,
        (0,),
        more=(1, 2),
        grows=True,
        small=lambda: dataclasses.replace(base(), **workload.smoke),
    )


OURS = ("elementwise", "adam_mini", "derived", "factored")
BEST_RIVALS = ("adamuon", "soap", "normuon", "muon")
"""The four rivals with the lowest mean loss in the study ``rivals``."""
STUDIES: dict[str, Study] = {
    "ablation": Study(byte_llama),
    "carry_over": Study(
        byte_gpt, ("elementwise", "adam_mini", "derived_blocks", "derived", "factored"), (3e-3, 1e-2), EIGHT
    ),
    "statistics": Study(
        byte_llama,
        ("elementwise", "adam_mini", *VARIANTS),
        grown={"adam_mini_max": (3e-2,), "adam_mini_min": (3e-4,), "adam_mini_jensen": (3e-4,)},
    ),
    "rivals": Study(
        byte_llama,
        ("elementwise", *RIVALS),
        own={arm: rival.rates for arm, rival in RIVALS.items()},
        grown={"soap": (3e-2,)},
    ),
    "record": Study(
        small_llama,
        OURS,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        settings={
            f"warm-up {warmup:g}, {'clip 1' if clip else 'no clipping'}": {"warmup": warmup, "clip": clip}
            for warmup, clip in itertools.product((0.0, 0.02, 0.1), (1.0, 0.0))
        },
    ),
    "headline": Study(
        byte_llama,
        (*OURS, "slim_adam", "permuted", *BEST_RIVALS),
        seeds=(0,),
        own={arm: RIVALS[arm].rates for arm in BEST_RIVALS},
        settings=_places(),
        more=tuple(range(1, 10)),
        grows=True,
        shares=("ablation", "carry_over", "rivals"),
    ),
    "sensitivity": Study(small_llama, OURS, (1e-3, 3e-3, 1e-2, 3e-2), settings=_one_changed()),
    "length": Study(byte_llama, OURS, seeds=(0,), settings=_lengths(), more=(1, 2), grows=True),
    **{name: of_workload(name, workload) for name, workload in WORKLOADS.items()},
}


def grid(profile: str, arms: tuple[str, ...] | None = None, study: str = "ablation") -> list[TrainConfig]:
    """Return the configs of a study's grid, seed by seed; ``experiments.growing`` has those that follow from results.

    Args:
        profile: ``cpu`` for the committed results, or ``smoke`` for runs of some seconds with the same code.
        arms: the arms to run; None for all of the study.
        study: name of a study.

    Raises:
        ValueError: an arm or the study is unknown.
    """
    if study not in STUDIES:
        raise ValueError(f"study={study!r} is unknown; choose from {sorted(STUDIES)}")
    chosen = STUDIES[study]
    unknown = set(arms or ()) - set(chosen.arms)
    if unknown:
        raise ValueError(f"arms={sorted(unknown)} are unknown; choose from {chosen.arms}")
    runs, settings, base = chosen.runs(arms or chosen.arms), chosen.settings, chosen.base()
    if profile == "smoke":
        first = {arm: (seed, "", lr, arm) for seed, _, lr, arm in reversed(runs)}
        runs, settings, base = list(first.values())[::-1], PLAIN, chosen.small()
    base = dataclasses.replace(base, experiment=f"{study}_{profile}")
    return [dataclasses.replace(base, **settings[s], arm=arm, lr=lr, seed=seed) for seed, s, lr, arm in runs]


def names(configs: Sequence[TrainConfig]) -> list[str]:
    """Return the names of runs within their study: arm, learning rate, seed, and the fields in which settings differ.

    Intervals between validations and checkpoints are left out.
    """
    # All fields, also those that a document leaves out where they have their default.
    documents = [{**vars(config), "model": config.to_dict()["model"]} for config in configs]
    varying = [
        key
        for key in documents[0]
        if key not in _UNNAMED and any(document[key] != documents[0][key] for document in documents)
    ]
    return [
        " ".join([c.arm, f"{c.lr:g}", str(c.seed), *(f"{key}={_short(document[key])}" for key in varying)])
        for c, document in zip(configs, documents, strict=True)
    ]


def _short(value: Any) -> str:
    """Return a value of a config in one word; a model is its kind and its width."""
    if isinstance(value, Mapping):
        return f"{value['kind'].removesuffix('Config').lower()}-{value.get('dim', value.get('n_embd'))}"
    return f"{value:g}" if isinstance(value, float) else str(value)
