"""Batches of images are functions of (seed, step), and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.configs import TrainConfig
from experiments.data import epoch_rows, fashion
from experiments.tasks import Task
from experiments.workloads import WORKLOADS, vision
from experiments.workloads.images import mirrored, pieces, require_data, shifted
from experiments.workloads.vision import Classifier


def test_an_epoch_shows_every_image_once() -> None:
    epochs = [np.concatenate([epoch_rows(103, 5, 10 * epoch + i, 10)[0] for i in range(10)]) for epoch in range(2)]
    for rows in epochs:
        assert len(rows) == len(np.unique(rows)) == 100 and 0 <= rows.min() <= rows.max() < 103
    assert not np.array_equal(*epochs)


def test_rows_and_further_draws_are_functions_of_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> tuple[list[int], float]:
        rows, draw = epoch_rows(50, seed, step, 7)
        return rows.tolist(), draw.random()

    wanted = {(seed, step): drawn(seed, step) for seed in (0, 1) for step in (0, 1, 9)}
    assert {place: drawn(*place) for place in reversed(wanted)} == wanted
    assert len({tuple(rows) for rows, _ in wanted.values()}) == len({more for _, more in wanted.values()}) == 6


def test_more_rows_than_pixelsare_refused() -> None:
    with pytest.raises(ValueError, match="batch=8 must be at most 7"):
        epoch_rows(7, 0, 0, 8)


def test_a_shifted_image_keeps_its_content() -> None:
    """Every image with a black margin is found again in its shifted form, mirrored or not; all places occur."""
    draw = np.random.default_rng(0)
    before = np.zeros((400, 12, 12), np.uint8)
    before[:, 2:-2, 2:-2] = draw.integers(1, 255, (400, 8, 8))
    after = shifted(before, draw)
    assert after.shape == before.shape and after.dtype == np.uint8
    places = set()
    for old, new in zip(before, after, strict=True):
        down, right = (int(np.flatnonzero(new.any(axis)).min()) for axis in (1, 0))
        block, inside = new[down : down + 8, right : right + 8], old[2:-2, 2:-2]
        mirror = np.array_equal(block, inside[:, ::-1])
        assert mirror or np.array_equal(block, inside)
        places.add((down, right, mirror))
    assert places == {(down, right, mirror) for down in range(5) for right in range(5) for mirror in (False, True)}


def test_mirrored_leaves_its_argument_alone_and_mirrors_about_half() -> None:
    before = np.random.default_rng(0).integers(0, 255, (200, 3, 4, 2))
    kept = before.copy()
    after = mirrored(before, np.random.default_rng(1))
    assert np.array_equal(before, kept)
    turned = [np.array_equal(new, old[:, ::-1]) for old, new in zip(before, after, strict=True)]
    assert all(turn or np.array_equal(new, old) for turn, old, new in zip(turned, before, after, strict=True))
    assert 70 < sum(turned) < 130


def test_pieces_are_the_whole_batch() -> None:
    batch = torch.arange(7), torch.arange(7) * 2
    cut = list(pieces(batch, 3))
    assert [len(a) for a, _ in cut] == [3, 3, 1]
    assert torch.equal(torch.cat([b for _, b in cut]), batch[1])


def test_unknown_pixelsare_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"data='imagenet' .* choose from \('fashion-mnist',\)"):
        require_data("imagenet", vision.READ)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "resnet50"}, "network='resnet50' is unknown"),
        ({"norm": "layer"}, "norm='layer' is unknown"),
        ({"augment": "no"}, "augment='no' is unknown"),
        ({"width": 48}, "width=48 must be a multiple of 32"),
        ({"network": "vit", "width": 96}, "width=96 must be a multiple of 64"),
        ({"depth": 0}, "depth=0 must be a whole number"),
        ({"patch": 3.5}, "patch=3.5 must be a whole number"),
        ({"network": "vit", "stem": "pool"}, "stem='pool' is unknown"),
        ({"network": "vit", "stem": "convolutions", "patch": 7}, "patch=7 must be 2, 4, 8 or 16"),
        ({"smoothing": 1.0}, r"smoothing=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_sizes_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: {message}"):
        TrainConfig("test", Classifier(**fields), data="fashion-mnist")


def test_patches_that_do_not_fit_are_refused_before_a_library_is_needed() -> None:
    config = TrainConfig("test", Classifier("vit", width=64, patch=5), data="fashion-mnist")
    with pytest.raises(ValueError, match=r"model\.patch=5 must divide 28"):
        config.model.fetch(config)


def test_configs_of_classifiers_are_read_back() -> None:
    for workload in (vision.RESNET, vision.RESNET_BATCHNORM, vision.VIT):
        for more in ({}, *workload.full.values()):
            config = TrainConfig("test", **{**workload.run, **more})
            assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_full_runs_have_the_lengths_of_their_papers() -> None:
    resnet, deit = vision.RESNET_BATCHNORM.full["resnet18_imagenet"], vision.VIT.full["deit_tiny"]
    assert resnet["steps"] * 256 == pytest.approx(90 * 1_281_167, rel=1e-3)
    assert deit["steps"] * 1024 == pytest.approx(300 * 1_281_167, rel=1e-3)
    assert deit["lr"] == 1e-3 and deit["lr"] * deit["lr_end"] == pytest.approx(1e-5)


def test_convolutions_give_one_token_for_each_patch() -> None:
    for side, patch, tokens in ((28, 8, 16), (28, 4, 49), (32, 16, 4)):
        stem = vision.Convolutions(img_size=side, patch_size=patch, in_chans=1, embed_dim=64)
        assert stem(torch.zeros(2, 1, side, side)).shape == (2, tokens, 64) and stem.num_patches == tokens


class _Linear(torch.nn.Module):
    """A classifier that needs no library."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(28 * 28, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.flatten(1))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    draw = np.random.default_rng(0)
    sets = {
        part: (draw.integers(0, 255, (n, 28, 28)).astype(np.uint8), draw.integers(0, 10, n))
        for part, n in (("train", 40), ("t10k", 20))
    }
    monkeypatch.setattr(vision, "fashion_mnist", lambda part="train": sets[part])
    monkeypatch.setattr(vision, "build", lambda *_: _Linear())
    config = TrainConfig("test", Classifier(augment=True), data="fashion-mnist", batch=8, eval_batches=2)
    return config.model.task(config, torch.device("cpu"))


def test_a_classifier_that_knows_nothing_has_the_loss_of_ten_classes(task: Task) -> None:
    pixels, labels = batch = task.batch(3)
    assert pixels.shape == (8, 1, 28, 28) and labels.shape == (8,) and labels.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(batch, task.batch(3), strict=True))
    assert not torch.equal(pixels, task.batch(4)[0])
    assert task.loss(task.model, batch).item() == pytest.approx(np.log(10))
    whole, cut = (task.evaluate(rows=rows, casting=nullcontext) for rows in (0, 5))
    assert list(whole) == ["val_loss", "accuracy"] and whole == pytest.approx(cut)
    assert whole["val_loss"] == pytest.approx(np.log(10))
    assert 16 * whole["accuracy"] == pytest.approx(int((vision.fashion_mnist("t10k")[1][:16] == 0).sum()))


@pytest.mark.parametrize("name", ["", "train-images-idx3-ubyte"])
def test_files_of_torchvision_in_the_cache_folder_serve_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are the same files, whose compression has another header; content that changed is refused."""
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(fashion, "INSTALLED", Path("/nowhere"))
    with pytest.raises(FileNotFoundError, match=rf"torchvision .* FashionMNIST\('{tmp_path}', download=True\)"):
        fashion.fashion_mnist.__wrapped__()
    place = tmp_path / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    contents = {
        "train-images-idx3": b"\0\0\x08\3\0\0\0\1\0\0\0\1\0\0\0\1\7",
        "train-labels-idx1": b"\0\0\x08\1\0\0\0\1\2",
    }
    for file, content in contents.items():
        packed = io.BytesIO()
        with gzip.GzipFile(name, "wb", fileobj=packed, mtime=len(name)) as file_in_it:
            file_in_it.write(content)
        (place / f"{file}-ubyte.gz").write_bytes(packed.getvalue())
    with pytest.raises(ValueError, match=r"unpacks to sha256 .* is pinned"):
        fashion.fashion_mnist.__wrapped__()
    hashes = {file[:-5]: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(fashion, "SHA256", hashes)
    pixels, labels = fashion.fashion_mnist.__wrapped__()
    assert (pixels.tolist(), labels.tolist()) == ([[[7]]], [2])


def test_every_workload_has_a_smaller_smoke_run() -> None:
    for workload in WORKLOADS.values():
        config = dataclasses.replace(TrainConfig("test", **workload.run), **workload.smoke)
        assert config.steps < workload.run["steps"]
