"""The image classifiers with timm and Fashion-MNIST."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments.configs import TrainConfig
from experiments.data import fashion
from experiments.train import fetch, run_folder, train
from experiments.workloads import WORKLOADS, libraries
from experiments.workloads.vision import Classifier, build
from tests.workloads import runs

NAMES = ("resnet", "resnet_batchnorm", "vit")


@pytest.mark.parametrize("name", NAMES)
def check_every_arm_finishes(tmp_path: Path, name: str) -> None:
    losses = set()
    for arm in WORKLOADS[name].arms:
        config = runs.small(name, arm=arm)
        assert train(config, tmp_path)["state"] == "finished"
        records = runs.records(tmp_path, config)
        assert [record["step"] for record in records] == [2, 4]
        assert all(0 <= record["accuracy"] <= 1 for record in records)
        losses.add(records[-1]["val_loss"])
    assert len(losses) == len(WORKLOADS[name].arms)


@pytest.mark.parametrize("name", NAMES)
def check_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = runs.small(name, arm="derived")
    if name == "vit":  # stochastic depth draws from torch's generator
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2, drop_path=0.5))
    runs.require_same_after_a_kill(config, tmp_path, monkeypatch, after=3)


def check_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (build(Classifier(width=32), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Classifier(norm="batch", width=64), 11_689_512),
        (Classifier("vit", width=192, depth=12, patch=16), 5_717_416),
        (Classifier("vit", width=384, depth=12, patch=16), 22_050_664),
    ],
    ids=["resnet18", "deit_tiny", "deit_small"],
)
def check_full_size_models_have_their_papers_sizes(kind: Classifier, expected: int) -> None:
    """The known numbers of parameters, with classes and channels of ImageNet."""
    model = build(kind, 0, "imagenet")
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "full"), [("resnet_batchnorm", "resnet18_imagenet"), ("vit", "deit_tiny"), ("vit", "deit_small")]
)
def check_full_size_runs_take_two_steps_at_reduced_width(tmp_path: Path, name: str, full: str) -> None:
    config = runs.reduced(name, full)
    smaller = {"width": config.model.width // 2} if name != "vit" else {"width": 64, "depth": 2, "patch": 14}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **smaller))
    assert train(config, tmp_path)["state"] == "finished"


@pytest.mark.parametrize("name", NAMES)
def check_the_optimizer_recognises_every_weight(name: str) -> None:
    config = TrainConfig("check", **WORKLOADS[name].run)
    runs.require_recognised(build(config.model, 0))


def check_imagenet_is_refused_by_name(tmp_path: Path) -> None:
    config = TrainConfig("check", **{**WORKLOADS["vit"].run, **WORKLOADS["vit"].full["deit_tiny"]})
    for refused in (fetch, lambda config: train(config, tmp_path)):
        with pytest.raises(ValueError, match="data='imagenet' is no set of images"):
            refused(config)
    status = json.loads((run_folder(tmp_path, config.with_rules_hash()) / "status.json").read_text())
    assert status["state"] == "failed"


def check_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(libraries.importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match=r"needs the library timm .*make setup-workloads"):
        fetch(runs.small("vit"))


def check_missing_images_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion, "folders", lambda: [tmp_path])
    fashion.fashion_mnist.cache_clear()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fetch(runs.small("vit"))
    fashion.fashion_mnist.cache_clear()
