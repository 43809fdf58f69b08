"""Diffusion models with diffusers and Fashion-MNIST."""

from __future__ import annotations

import base64
import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.configs import TrainConfig
from experiments.train import fetch, make_task, run_folder, train
from experiments.workloads import WORKLOADS, diffusion
from experiments.workloads.diffusion import Diffusion, build
from tests.workloads import runs

NAMES = ("diffusion", "dit")


@pytest.mark.parametrize("name", NAMES)
def check_every_arm_finishes_and_seed_0_leaves_samples(tmp_path: Path, name: str) -> None:
    seen = set()
    for arm in WORKLOADS[name].arms:
        config = runs.small(name, arm=arm)
        assert train(config, tmp_path)["state"] == "finished"
        document = json.loads((run_folder(tmp_path, config) / "samples.json").read_text())
        pixels = np.frombuffer(base64.b64decode(document["base64"]), document["dtype"]).reshape(document["shape"])
        assert pixels.shape == (16, 28, 28) and len(np.unique(pixels)) > 2
        seen.add(document["base64"])
    assert len(seen) == len(WORKLOADS[name].arms)
    other = runs.small(name, seed=1)
    train(other, tmp_path)
    assert not (run_folder(tmp_path, other) / "samples.json").exists()


@pytest.mark.parametrize("name", NAMES)
def check_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Dropout draws from torch's generator, and so does the DiT where it drops classes."""
    config = runs.small(name, arm="derived")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.3))
    runs.require_same_after_a_kill(config, tmp_path, monkeypatch, after=3)
    killed, straight = (run_folder(tmp_path / how, config) / "samples.json" for how in ("killed", "straight"))
    assert killed.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def check_training_beats_an_untrained_model(tmp_path: Path, name: str) -> None:
    """A prediction of zero has a loss of 1, and thirty steps are enough for less than half of it."""
    config = runs.small(name, steps=30, eval_every=30, batch=16, eval_batches=8, checkpoint_every=0, lr=3e-3)
    untrained = make_task(config, torch.device("cpu")).evaluate(casting=nullcontext)["val_loss"]
    assert untrained > 0.9
    assert train(config, tmp_path)["final_val_loss"] < (0.8 if name == "dit" else 0.5) * untrained


def check_held_out_noise_is_the_same_for_every_seed_and_timesteps_are_spread() -> None:
    tasks = [make_task(runs.small("diffusion", seed=seed, eval_batches=4), torch.device("cpu")) for seed in (0, 1)]
    for one, other in zip(*(task.held_out for task in tasks), strict=True):
        assert torch.equal(one, other)
    assert len(tasks[0].held_out[0]) == 32
    assert torch.histc(tasks[0].held_out[3].float(), 8, 0, 1000).tolist() == [4] * 8
    assert not torch.equal(tasks[0].batch(0)[2], tasks[1].batch(0)[2])


def check_the_dit_starts_as_a_prediction_of_zero() -> None:
    model = build(Diffusion("dit", width=64, depth=1), 0)
    noisy, times = torch.randn(2, 1, 32, 32), torch.tensor([3, 900])
    assert not model(noisy, timestep=times, class_labels=torch.tensor([1, 2])).sample.any()


def check_the_full_size_unet_has_its_papers_size() -> None:
    """35.7M parameters; 35,746,307 in the weights that were converted for diffusers (google/ddpm-cifar10-32)."""
    config = TrainConfig("check", **{**WORKLOADS["diffusion"].run, **WORKLOADS["diffusion"].full["ddpm_cifar10"]})
    assert sum(p.numel() for p in build(config.model, 0, channels=3).parameters()) == 35_746_307


def check_the_full_size_run_takes_two_steps_at_reduced_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In colour; the archive's 170 MB are not needed here."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    monkeypatch.setattr(diffusion, "load", lambda data, held_out=False: (images, np.arange(8)))
    config = runs.reduced("diffusion", "ddpm_cifar10", data="cifar10")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=8))
    assert train(config, tmp_path)["state"] == "finished"
    samples = json.loads((run_folder(tmp_path, config) / "samples.json").read_text())
    assert samples["shape"] == [16, 32, 32, 3]


def check_a_missing_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data='cifar10' needs .*cifar-10-binary\.tar\.gz"):
        fetch(runs.small("diffusion", data="cifar10"))


@pytest.mark.parametrize("name", NAMES)
def check_the_optimizer_recognises_every_weight(name: str) -> None:
    config = TrainConfig("check", **WORKLOADS[name].run)
    runs.require_recognised(build(config.model, 0))


def check_unknown_images_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="data='celeba' is no set of images"):
        fetch(runs.small("diffusion", data="celeba"))
