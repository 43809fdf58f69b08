"""Noise and timesteps are functions of (seed, step), held-out ones of nothing, and bad sizes are refused by name."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.configs import TrainConfig
from experiments.data import cifar
from experiments.workloads import diffusion
from experiments.workloads.diffusion import Denoising, Diffusion, as_document, to_bytes, to_canvas


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_come_back_from_the_canvas(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, channels)).astype(np.uint8)
    canvas = to_canvas(images)
    assert canvas.shape == (3, channels, 32, 32) and canvas.min() == -1 and canvas.max() == 1
    wanted = images if channels > 1 else images[:, 2:-2, 2:-2, 0]
    assert np.array_equal(to_bytes(canvas), wanted)
    assert np.array_equal(to_bytes(3 * canvas)[wanted == 255], wanted[wanted == 255])  # beyond white is white


def test_images_of_clothes_get_a_black_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(1, 256, (2, 28, 28)).astype(np.uint8)
    monkeypatch.setattr(diffusion, "fashion_mnist", lambda part: (images, np.array([1, 2])))
    padded, _ = diffusion.load("fashion-mnist")
    assert padded.shape == (2, 32, 32, 1) and np.array_equal(padded[:, 2:-2, 2:-2, 0], images)
    assert padded.sum() == images.sum()


def test_cifar_is_read_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    read = cifar.cifar10.__wrapped__
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz; download it from https://www\.cs\.toronto"):
        read()
    colours = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32)).astype(np.uint8)
    with tarfile.open(tmp_path / cifar.ARCHIVE, "w:gz") as archive:
        for i, name in enumerate([*cifar.FILES["train"], *cifar.FILES["test"]]):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            content = bytes([i]) + colours[i].tobytes()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(RuntimeError, match="is pinned"):
        read()
    monkeypatch.setattr(cifar, "SHA256", hashlib.sha256((tmp_path / cifar.ARCHIVE).read_bytes()).hexdigest())
    images, labels = read()
    assert images.shape == (5, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(images[3, 7, 9], colours[3, :, 7, 9])
    assert read("test")[1].tolist() == [5]


def test_a_document_of_images_can_be_decoded() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    document = as_document(images)
    decoded = np.frombuffer(base64.b64decode(document["base64"]), document["dtype"]).reshape(document["shape"])
    assert np.array_equal(decoded, images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "unet3d"}, "network='unet3d' is unknown"),
        ({"width": 30}, "width=30 must be a multiple of 4"),
        ({"network": "dit", "width": 96}, "width=96 must be a multiple of 64"),
        ({"attention": 7}, r"attention=7 must be the side of a stage, one of \(32, 16, 8\)"),
        ({"stages": 7, "attention": 8}, "stages=7 is too many"),
        ({"patch": 5}, "patch=5 must divide the side of an image, 32"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"blocks": 0}, "blocks=0 must be a whole number"),
    ],
)
def test_bad_sizes_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: {message}"):
        TrainConfig("test", Diffusion(**fields), data="fashion-mnist")


def test_configs_of_diffusion_models_are_read_back() -> None:
    for workload in (diffusion.DIFFUSION, diffusion.DIT):
        for more in ({}, *workload.full.values()):
            config = TrainConfig("test", **{**workload.run, **more})
            assert TrainConfig.from_dict(config.to_dict()) == config


class _Scheduler:
    """The forward process of a thousand steps, each of which adds as much noise."""

    def __init__(self, **_: Any) -> None: ...

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        share = ((timesteps + 1) / 1000)[:, None, None, None]
        return (1 - share).sqrt() * images + share.sqrt() * noise


class _Same(nn.Module):
    """A network that takes what it sees for noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, noisy: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.scale * noisy)


def make(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Denoising:
    draw = np.random.default_rng(0)
    sets = {
        part: (draw.integers(0, 255, (n, 28, 28)).astype(np.uint8), draw.integers(0, 10, n))
        for part, n in (("train", 40), ("t10k", 20))
    }
    monkeypatch.setattr(diffusion, "fashion_mnist", lambda part="train": sets[part])
    monkeypatch.setattr(diffusion, "build", lambda *_: _Same())
    monkeypatch.setattr(diffusion, "library", lambda *_: SimpleNamespace(DDPMScheduler=_Scheduler))
    config = TrainConfig("test", Diffusion(), **{"data": "fashion-mnist", "batch": 8, "eval_batches": 2, **fields})
    return config.model.task(config, torch.device("cpu"))


def test_a_step_is_a_function_of_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(monkeypatch)
    images, labels, noise, timesteps = batch = task.batch(3)
    assert images.shape == noise.shape == (8, 1, 32, 32) and labels.shape == timesteps.shape == (8,)
    assert all(torch.equal(a, b) for a, b in zip(batch, make(monkeypatch).batch(3), strict=True))
    for other in (task.batch(4), make(monkeypatch, seed=1).batch(3)):
        assert not torch.equal(noise, other[2]) and not torch.equal(timesteps, other[3])


def test_noise_is_standard_and_timesteps_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(monkeypatch)
    noise, timesteps = (torch.cat([task.batch(step)[part] for step in range(50)]) for part in (2, 3))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert 0 <= timesteps.min() < 20 and 980 < timesteps.max() < 1000
    assert abs(timesteps.float().mean() - 500) < 60


def test_held_out_noise_is_fixed_and_every_level_of_it_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (make(monkeypatch, seed=seed).held_out for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.histc(one[3].float(), 16, 0, 1000).tolist() == [1] * 16


def test_the_loss_is_the_squared_error_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(monkeypatch)
    images, _, noise, timesteps = batch = task.held_out
    share = ((timesteps + 1) / 1000)[:, None, None, None]
    wanted = ((1 - share).sqrt() * images + (share.sqrt() - 1) * noise).square().mean().item()
    assert task.loss(task.model, batch).item() == pytest.approx(wanted, rel=1e-5)
    for rows in (0, 5):
        assert task.evaluate(rows=rows, casting=nullcontext) == {"val_loss": pytest.approx(wanted, rel=1e-5)}
    with torch.no_grad():
        task.model.scale.zero_()
    assert task.evaluate(casting=nullcontext)["val_loss"] == pytest.approx(noise.square().mean().item())


def test_only_seed_0_leaves_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(monkeypatch, seed=1).artefacts(casting=nullcontext) == {}
