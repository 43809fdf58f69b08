"""How far other optimizers' weights go from AdamW's: ``python -m experiments.studies.trajectories``.

Every optimizer starts from AdamW's weights and sees its batches. At some steps the distance of its weights from AdamW's
is divided by the distance that AdamW's weights have moved by then. The paper reports that Adam-mini stays closest
(arXiv 2406.16793). Two controls tell what a distance means: AdamW whose first weights differ in the last digits, and
AdamW on other batches. docs/protocol.md says what was decided before the runs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.configs import TrainConfig
from experiments.grids import small_llama
from experiments.optimizers import optimizer_of
from experiments.passes import backward
from experiments.storage import environment, read_json, require_writable, write_json
from experiments.tasks import LanguageModelling
from experiments.train import learning_rate

BASE = "elementwise"
PERTURBED, OTHER_BATCHES = "perturbed", "other batches"
CONTROLS = (PERTURBED, OTHER_BATCHES)
RATES = {
    BASE: 3e-3,
    PERTURBED: 3e-3,
    OTHER_BATCHES: 3e-3,
    "adam_mini": 3e-3,
    "derived": 3e-3,
    "factored": 3e-3,
    "adafactor": 3e-2,
    "adafactor_zhai": 3e-3,
    "came": 3e-4,
    "sm3": 3e-2,
    "lion": 1e-3,
    "sgd": 3e-1,
    "muon": 1e-2,
}
"""Arm -> learning rate: the best ones on the Llama of 0.85M parameters (docs/suite.md)."""
SEEDS = (0, 1, 2)
VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What the study runs.

    Attributes:
        config: the run of AdamW.
        every: steps between distances.
        arms: the arms, controls included.
        seeds: the seeds.
        perturbation: standard deviation of the change of ``perturbed``, as a share of a tensor's.
    """

    config: TrainConfig = dataclasses.field(default_factory=small_llama)
    every: int = 25
    arms: tuple[str, ...] = tuple(arm for arm in RATES if arm != BASE)
    seeds: tuple[int, ...] = SEEDS
    perturbation: float = 1e-6


class Way:
    """One optimizer on its way: its model, and one step after the other.

    Args:
        config: the run; its arm may be a control.
        perturbation: of the first weights, if the arm is ``perturbed``.
    """

    def __init__(self, config: TrainConfig, perturbation: float) -> None:
        arm = BASE if config.arm in CONTROLS else config.arm
        self.config, self.step = config, 0
        self.task = LanguageModelling(config, torch.device("cpu"))
        self.model = self.task.model
        self.shift = 1_000_000 if config.arm == OTHER_BATCHES else 0
        if config.arm == PERTURBED:
            generator = torch.Generator().manual_seed(config.seed)
            with torch.no_grad():
                for p in self.model.parameters():
                    spread = p.std() if p.numel() > 1 else p.abs().mean()
                    p += perturbation * spread * torch.randn(p.shape, generator=generator)
        self.optimizer = optimizer_of(self.model, dataclasses.replace(config, arm=arm))

    def advance(self) -> None:
        """Take one step."""
        config = self.config
        backward(self.model, self.task.batch(self.step + self.shift))
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def weights(self) -> Tensor:
        """Return all weights as one vector, [parameters] of float64."""
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])


def compared(way: Tensor, base: Tensor) -> tuple[float, float]:
    """Return the distance of the ends of two ways from one start, divided by the base's length, and their cosine."""
    return ((way - base).norm() / base.norm()).item(), (way @ base / way.norm() / base.norm()).item()


def distances(settings: Settings, seed: int) -> dict[str, Any]:
    """Return the distances of one seed.

    Args:
        settings: the study.
        seed: seed of weights and batches.

    Returns:
        ``steps``, ``moved`` (AdamW's distance from its first weights), and arm -> ``distance`` (from AdamW's weights,
        divided by ``moved``) and ``cosine`` (of the two displacements from AdamW's first weights), one per step.
    """

    def begin(arm: str) -> Way:
        return Way(dataclasses.replace(settings.config, arm=arm, lr=RATES[arm], seed=seed), settings.perturbation)

    base, others = begin(BASE), {arm: begin(arm) for arm in settings.arms}
    first = base.weights()
    found: dict[str, Any] = {"steps": [], "moved": []}
    arms: dict[str, dict[str, list[float]]] = {arm: {"distance": [], "cosine": []} for arm in others}
    for step in tqdm(range(1, settings.config.steps + 1), desc=f"seed {seed}"):
        for path in (base, *others.values()):
            path.advance()
        if step % settings.every == 0 or step == settings.config.steps:
            moved = base.weights() - first
            found["steps"].append(step)
            found["moved"].append(moved.norm().item())
            for arm, path in others.items():
                distance, cosine = compared(path.weights() - first, moved)
                arms[arm]["distance"].append(distance)
                arms[arm]["cosine"].append(cosine)
    return {**found, "arms": arms}


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Run the seeds that are not in the file yet, and write it after each.

    Raises:
        ValueError: the file has other settings.
    """
    identity = {"config": settings.config.to_dict(), "rates": {arm: RATES[arm] for arm in (BASE, *settings.arms)}}
    identity |= {"every": settings.every, "perturbation": settings.perturbation, "version": VERSION}
    found = read_json(out)
    stored: Mapping[str, Any] = {"settings": identity, "seeds": {}} if found is None else found
    if stored.get("settings") != identity:
        raise ValueError(f"out={out} was written with other settings; give another file, or delete it")
    document = {**stored, "environment": environment()}
    for seed in settings.seeds:
        if str(seed) not in document["seeds"]:
            document["seeds"] = {**document["seeds"], str(seed): distances(settings, seed)}
            write_json(out, document)
    return document


def main(out: Path = Path("results/trajectories/distances.json"), threads: int = 1) -> None:
    """Measure how far the weights of other optimizers are from AdamW's along a run. This takes some minutes.

    Args:
        out: the file; seeds that are in it are not run again.
        threads: number of torch threads.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    with refusals(ValueError, OSError):
        require_writable(out.parent, "out")
        document = run(Settings(), out)
    last = {arm: [seed["arms"][arm]["distance"][-1] for seed in document["seeds"].values()] for arm in Settings().arms}
    for arm, values in sorted(last.items(), key=lambda item: sum(item[1])):
        print(f"{arm:16s} {sum(values) / len(values):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
