"""Image classification: timm's ResNet-18 and ViT on Fashion-MNIST, 60,000 images to train on and 10,000 held out.

A run sees every image about once, so images are shown as they are; ``augment`` is for longer runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import epoch_rows, fashion_mnist
from experiments.data.fashion import KINDS_OF_CLOTHES, SHA256, SIDE

from .images import pieces, require_data, shifted, to_labels
from .libraries import library
from .workload import CONVOLUTION_ARMS, Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

Network = Literal["resnet18", "vit"]
Norm = Literal["group", "batch"]
Stem = Literal["patches", "convolutions"]
SIZES = {"fashion-mnist": (SIDE, 1, KINDS_OF_CLOTHES), "imagenet": (224, 3, 1000)}
"""Height and width of an image, channels and classes. Of ImageNet only the sizes are known here, for models."""
READ = ("fashion-mnist",)
SMALL = 64
"""Images of at most this side get a first convolution of 3 x 3 and no pooling after it."""
HEAD, GROUPS = 64, 32


@dataclass(frozen=True)
class Classifier:
    """An image classifier of timm.

    Attributes:
        network: ``resnet18`` or ``vit``.
        norm: normalisation of the ResNet: ``group`` (32 groups) or ``batch``.
        width: channels of the ResNet's first stage, or width of the ViT.
        depth: blocks of the ViT.
        patch: side of the ViT's patches, in pixels.
        stem: what makes the ViT's tokens of an image: ``patches``, or ``convolutions`` of stride 2 (Xiao et al., arXiv
            2106.14881), with which it learns in fewer steps; then ``patch`` is the pixels between tokens, a power of 2.
        augment: whether training images are moved by up to two pixels and half of them mirrored.
        smoothing: share of a training label that is spread over all classes.
        drop_path: how often the ViT's last block is skipped in training; earlier blocks are skipped less.
    """

    network: Network = "resnet18"
    norm: Norm = "group"
    width: int = 64
    depth: int = 6
    patch: int = 7
    stem: Stem = "patches"
    augment: bool = False
    smoothing: float = 0.0
    drop_path: float = 0.0

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a word is unknown, or a size is out of range.
        """
        words = {"network": get_args(Network), "norm": get_args(Norm), "stem": get_args(Stem), "augment": (True, False)}
        for name, choices in words.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {choices}")
        for name in ("width", "depth", "patch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, at least 1")
        for name in ("smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if self.stem == "convolutions" and self.patch not in (2, 4, 8, 16):
            raise ValueError(f"patch={self.patch} must be 2, 4, 8 or 16 with stem='convolutions', each of which halves")
        if self.network == "vit" and self.width % HEAD:
            raise ValueError(f"width={self.width} must be a multiple of {HEAD}, the width of a head")
        if self.network == "resnet18" and self.norm == "group" and self.width % GROUPS:
            raise ValueError(f"width={self.width} must be a multiple of {GROUPS}, the number of groups")

    def fetch(self, config: TrainConfig) -> None:
        """Check that timm and the images are there.

        Raises:
            FileNotFoundError: the images are not there.
            RuntimeError: timm is not installed.
            ValueError: the data is unknown or does not fit the model, or a file is damaged.
        """
        require_data(config.data, READ)
        require_fit(self, config.data)
        library("timm", "an image classifier")
        fashion_mnist()

    def task(self, config: TrainConfig, device: torch.device) -> Classification:
        """Return the task that trains it."""
        return Classification(config, self, device)


def require_fit(kind: Classifier, data: str) -> None:
    """Check that a model fits images.

    Raises:
        ValueError: the ViT's patches do not.
    """
    side = SIZES[data][0]
    if kind.network == "vit" and kind.stem == "patches" and side % kind.patch:
        raise ValueError(f"model.patch={kind.patch} must divide {side}, the side of an image of {data}")


def build(kind: Classifier, seed: int, data: str = "fashion-mnist") -> nn.Module:
    """Build a classifier; its weights are a function of the seed.

    Args:
        kind: its sizes.
        seed: seed of the weights.
        data: the images that it classifies, a key of ``SIZES``.

    Raises:
        RuntimeError: timm is not installed.
        ValueError: the model does not fit the images.
    """
    require_fit(kind, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _vit(kind, data) if kind.network == "vit" else _resnet18(kind, data)


def _vit(kind: Classifier, data: str) -> nn.Module:
    side, channels, classes = SIZES[data]
    return library("timm", "an image classifier").create_model(
        "vit_tiny_patch16_224",
        num_classes=classes,
        in_chans=channels,
        img_size=side,
        patch_size=kind.patch,
        embed_dim=kind.width,
        depth=kind.depth,
        num_heads=kind.width // HEAD,
        drop_path_rate=kind.drop_path,
        **({"embed_layer": Convolutions} if kind.stem == "convolutions" else {}),
    )


class Convolutions(nn.Module):
    """Tokens by convolutions of 3 x 3 and stride 2, each with twice the channels of the one before.

    Args:
        img_size: height and width of an image.
        patch_size: pixels between tokens, a power of 2; one convolution for each halving.
        in_chans: channels of an image.
        embed_dim: width of a token.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        self.num_patches = (-(-img_size // patch_size)) ** 2
        layers: list[nn.Module] = []
        for left in range(halvings - 1, -1, -1):
            channels = embed_dim >> left
            layers += [nn.Conv2d(in_chans, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.ReLU()]
            in_chans = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens [n, tokens, width] of images [n, channels, height, width]."""
        return self.layers(images).flatten(2).transpose(1, 2)


def _resnet18(kind: Classifier, data: str) -> nn.Module:
    side, channels, classes = SIZES[data]
    resnet = library("timm.models.resnet", "an image classifier")
    layers = library("timm.layers", "an image classifier")
    model = resnet.ResNet(
        resnet.BasicBlock,
        (2, 2, 2, 2),
        num_classes=classes,
        in_chans=channels,
        channels=tuple(kind.width * 2**i for i in range(4)),
        norm_layer=layers.GroupNorm if kind.norm == "group" else nn.BatchNorm2d,
    )
    if side <= SMALL:
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, stride=2, padding=1, bias=False)
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
        require_data(config.data, READ)
        self.config, self.kind = config, kind
        self.model = build(kind, config.seed, config.data)
        self.images, self.labels = fashion_mnist()
        self.fingerprint = SHA256["train-images"]
        images, labels = fashion_mnist("t10k")
        held_out = config.eval_batches * config.batch
        self.held_out = to_input(images[:held_out]).to(device), to_labels(labels[:held_out]).to(device)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return (images, float [batch, 1, 28, 28]; labels, int64 [batch]) of a step."""
        rows, draw = epoch_rows(len(self.images), self.config.seed, step, self.config.batch)
        images = shifted(self.images[rows], draw) if self.kind.augment else self.images[rows]
        return to_input(images), to_labels(self.labels[rows])

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean cross entropy in nats."""
        images, labels = batch
        return F.cross_entropy(module(images).float(), labels, label_smoothing=self.kind.smoothing)

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


def to_input(images: np.ndarray) -> Tensor:
    """Scale bytes [n, side, side] to floats [n, 1, side, side] with mean about 0 and variance about 1."""
    return (torch.from_numpy(images.astype(np.float32))[:, None] / 255 - 0.286) / 0.353


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
IMAGES = 1_281_167
"""Training images of ImageNet."""


def _imagenet(model: Classifier, batch: int, epochs: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a run on ImageNet, which is validated after every epoch, on 50,000 images."""
    epoch = IMAGES // batch
    run = {"data": "imagenet", "batch": batch, "steps": epochs * epoch, "decay": "cosine", "beta2": 0.999, "clip": 0.0}
    validation = {"eval_every": epoch, "eval_batches": -(-50_000 // batch), "checkpoint_every": epoch}
    return {"model": model, **run, **validation, **fields}


# The authors of Adam-mini report ResNet-18 on ImageNet (arXiv 2406.16793); the settings of their text were not at hand.
# 90 epochs, batches of 256, weight decay 1e-4 and betas (0.9, 0.999) are those of the ImageNet code that they published
# (github.com/zyushun/hessian-spectrum, vision_models/main.py and run.sh). Assumed: AdamW's rate of 1e-3, which falls by
# a cosine without warm-up; their code's rate of 0.1 is SGD's.
RESNET18_IMAGENET = _imagenet(
    Classifier(norm="batch", width=64, augment=True), 256, 90, lr=1e-3, weight_decay=1e-4, warmup=0.0
)


def _deit(width: int) -> dict[str, Any]:
    """Return a ViT by DeiT's recipe (Touvron et al., arXiv 2012.12877, table 9; github.com/facebookresearch/deit).

    300 epochs of batches of 1,024; rate 5e-4 x batch / 512, 5 epochs of warm-up, cosine to 1e-5; weight decay 0.05;
    label smoothing 0.1; stochastic depth 0.1. Left out: RandAugment, mixup, cutmix, erasing, repeated images, averaged
    weights.
    """
    model = Classifier("vit", width=width, depth=12, patch=16, augment=True, smoothing=0.1, drop_path=0.1)
    rate = 5e-4 * 1024 / 512
    return _imagenet(model, 1024, 300, lr=rate, lr_end=1e-5 / rate, warmup=5 / 300, precision="bf16")


def _resnet(norm: Norm, **full: Mapping[str, Any]) -> Workload:
    model = {"model": Classifier(norm=norm, width=32)}
    return Workload({**_RUN, **model}, {**_SMOKE, **model}, _RATES, CONVOLUTION_ARMS, full=full)


_LONGER: dict[str, Any] = {"batch": 64, "steps": 2400, "eval_every": 400, "eval_batches": 157}
"""A ViT needs more steps than a ResNet for the same accuracy, and its steps are shorter."""
RESNET = _resnet("group")
RESNET_BATCHNORM = _resnet("batch", resnet18_imagenet=RESNET18_IMAGENET)
VIT = Workload(
    {**_RUN, **_LONGER, "model": Classifier("vit", width=128, depth=4, patch=8, stem="convolutions")},
    {**_SMOKE, "model": Classifier("vit", width=64, depth=1, patch=8, stem="convolutions")},
    _RATES,
    full={"deit_tiny": _deit(192), "deit_small": _deit(384)},
)
