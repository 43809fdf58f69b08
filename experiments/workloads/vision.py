"""Image classification: timm's ResNet-18 and ViT on Fashion-MNIST, 60,000 images to train on and 10,000 held out.

Images are shifted by up to two pixels and mirrored at random; both are functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import fashion_mnist
from experiments.data.fashion import KINDS_OF_CLOTHES, SHA256, SIDE

from .libraries import library
from .workload import ARMS, Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

Network = Literal["resnet18", "vit"]
Norm = Literal["group", "batch"]
SHIFT = 2
"""By how many pixels a training image is moved at most."""


@dataclass(frozen=True)
class Classifier:
    """An image classifier of timm.

    Attributes:
        network: ``resnet18``, with a first convolution of 3 x 3 and no pooling after it as for small images, or
            ``vit``.
        norm: normalisation of the ResNet: ``group`` (32 groups) or ``batch``.
        width: channels of the ResNet's first stage, or width of the ViT.
        depth: blocks of the ViT.
        patch: side of the ViT's patches, in pixels.
    """

    network: Network = "resnet18"
    norm: Norm = "group"
    width: int = 64
    depth: int = 6
    patch: int = 7

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a word is unknown, or a size does not fit the images.
        """
        for name, choices in (("network", get_args(Network)), ("norm", get_args(Norm))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {choices}")
        for name in ("width", "depth", "patch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, at least 1")
        if SIDE % self.patch:
            raise ValueError(f"patch={self.patch} must divide the side of an image, {SIDE}")
        if self.network == "vit" and self.width % HEAD:
            raise ValueError(f"width={self.width} must be a multiple of {HEAD}, the width of a head")
        if self.network == "resnet18" and self.norm == "group" and self.width % GROUPS:
            raise ValueError(f"width={self.width} must be a multiple of {GROUPS}, the number of groups")

    def fetch(self, config: TrainConfig) -> None:
        """Check that timm and the images are there.

        Raises:
            FileNotFoundError: the Debian package with the images is not installed.
            RuntimeError: timm is not installed.
            ValueError: the data is unknown, or a file is damaged.
        """
        require_data(config.data)
        library("timm", "an image classifier")
        fashion_mnist()

    def task(self, config: TrainConfig, device: torch.device) -> Classification:
        """Return the task that trains it."""
        return Classification(config, self, device)


HEAD, GROUPS = 64, 32


def require_data(name: str) -> None:
    """Check the name of the images.

    Raises:
        ValueError: it is not ``fashion-mnist``.
    """
    if name != "fashion-mnist":
        raise ValueError(f"data={name!r} is no set of images; use 'fashion-mnist'")


def build(kind: Classifier, seed: int) -> nn.Module:
    """Build a classifier of one-channel images; its weights are a function of the seed."""
    timm = library("timm", "an image classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.network == "vit":
            size = {"img_size": SIDE, "patch_size": kind.patch, "embed_dim": kind.width, "depth": kind.depth}
            return timm.create_model(
                "vit_tiny_patch16_224", num_classes=KINDS_OF_CLOTHES, in_chans=1, num_heads=kind.width // HEAD, **size
            )
        resnet = library("timm.models.resnet", "an image classifier")
        layers = library("timm.layers", "an image classifier")
        norm = layers.GroupNorm if kind.norm == "group" else nn.BatchNorm2d
        channels = tuple(kind.width * 2**i for i in range(4))
        model = resnet.ResNet(
            resnet.BasicBlock,
            (2, 2, 2, 2),
            num_classes=KINDS_OF_CLOTHES,
            in_chans=1,
            channels=channels,
            norm_layer=norm,
        )
        model.conv1 = nn.Conv2d(1, model.conv1.out_channels, 3, stride=2, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model


class Classification:
    """Cross entropy on training images, and cross entropy and accuracy on the first held-out images.

    Their number is the config's ``eval_batches`` times ``batch``, and all 10,000 if that is more.

    Args:
        config: the run.
        kind: the classifier.
        device: where held-out images are kept.
    """

    def __init__(self, config: TrainConfig, kind: Classifier, device: torch.device) -> None:
        require_data(config.data)
        self.config = config
        self.model = build(kind, config.seed)
        self.images, self.labels = fashion_mnist()
        self.fingerprint = SHA256["train-images"]
        images, labels = fashion_mnist("t10k")
        held_out = config.eval_batches * config.batch
        self.held_out = to_input(images[:held_out]).to(device), to_labels(labels[:held_out]).to(device)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return (images, float [batch, 1, 28, 28]; labels, int64 [batch]) of a step."""
        rows, draw = epoch_rows(len(self.images), self.config.seed, step, self.config.batch)
        return to_input(shifted(self.images[rows], draw)), to_labels(self.labels[rows])

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean cross entropy in nats."""
        images, labels = batch
        return F.cross_entropy(module(images).float(), labels)

    @torch.no_grad()
    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return cross entropy in nats and accuracy on the held-out images."""
        self.model.eval()
        loss, right = 0.0, 0
        for images, labels in pieces(self.held_out, rows or 500):
            with casting():
                logits = self.model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
        self.model.train()
        count = len(self.held_out[1])
        return {"val_loss": loss / count, "accuracy": right / count}


def pieces(batch: tuple[Tensor, ...], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield a batch in pieces of at most ``rows`` rows."""
    for start in range(0, len(batch[0]), rows):
        yield tuple(part[start : start + rows] for part in batch)


def epoch_rows(count: int, seed: int, step: int, rows: int) -> tuple[np.ndarray, np.random.Generator]:
    """Draw the examples of a step: epochs of shuffled examples, of which an incomplete last batch is left out.

    Args:
        count: number of examples.
        seed: seed of the order.
        step: index of the step, from 0.
        rows: examples per step.

    Returns:
        (their indices, int64 [rows]; a generator for further draws of this step)

    Raises:
        ValueError: there are fewer examples than rows.
    """
    if rows > count:
        raise ValueError(f"batch={rows} must be at most {count}, the number of training examples")
    epoch, place = divmod(step, count // rows)
    order = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch])).permutation(count)
    draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, step]))
    return order[place * rows : (place + 1) * rows], draw


def shifted(images: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Mirror half of the images and move each by up to ``SHIFT`` pixels, filled with black.

    Args:
        images: uint8 [n, side, side].
        draw: generator.
    """
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    mirror = draw.random(len(images)) < 0.5
    padded[mirror] = padded[mirror, :, ::-1]
    down, right = draw.integers(0, 2 * SHIFT + 1, (2, len(images)))
    side = np.arange(images.shape[1])
    return padded[
        np.arange(len(images))[:, None, None], down[:, None, None] + side[:, None], right[:, None, None] + side
    ]


def to_input(images: np.ndarray) -> Tensor:
    """Scale bytes [n, side, side] to floats [n, 1, side, side] with mean about 0 and variance about 1."""
    return (torch.from_numpy(images.astype(np.float32))[:, None] / 255 - 0.286) / 0.353


def to_labels(labels: np.ndarray) -> Tensor:
    """Return labels as int64, as ``torch`` wants them."""
    return torch.from_numpy(labels.astype(np.int64))


CONVOLUTION_ARMS = (*ARMS, "pytorch_default")
"""``adam_mini`` has one scalar per output channel of a convolution; ``pytorch_default`` has one per tensor."""
_RUN: dict[str, Any] = {
    "data": "fashion-mnist",
    "batch": 128,
    "seq_len": 1,
    "steps": 700,
    "eval_every": 100,
    "eval_batches": 79,
    "weight_decay": 0.05,
    "warmup": 0.05,
}
_SMOKE: dict[str, Any] = {"batch": 16, "steps": 4, "eval_every": 2, "eval_batches": 2, "checkpoint_every": 2}
_RATES = (3e-4, 1e-3, 3e-3)


def _resnet(norm: Norm) -> Workload:
    model = {"model": Classifier(norm=norm, width=32)}
    return Workload({**_RUN, **model}, {**_SMOKE, **model}, _RATES, CONVOLUTION_ARMS)


RESNET = _resnet("group")
RESNET_BATCHNORM = _resnet("batch")
VIT = Workload(
    {**_RUN, "model": Classifier("vit", width=192)},
    {**_SMOKE, "model": Classifier("vit", width=64, depth=1)},
    _RATES,
)
