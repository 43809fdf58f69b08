"""Part ``spectra``: are the spectra of a Transformer's blocks more different from each other than those of a CNN?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import batch_at, fashion_mnist, fixed_batches, load, reduced
from experiments.models import GPTConfig, build, lm_loss
from experiments.studies.paper_hessian.store import Cell, Part, settings_of
from hessian import HessianOperator, dense, js_distance
from hessian.parts import weight_parts
from optimizer import AdamMini

Batch = tuple[Tensor, Tensor]
Draw = Callable[[int], Batch]
MODELS = ("transformer", "cnn", "vision transformer")
CHECKPOINTS = ("initialisation", "trained")


@dataclass(frozen=True)
class Settings:
    """Sizes of the part.

    Attributes:
        steps: training steps.
        rows: sequences or images per step.
        lr: peak learning rate.
        width: width of the Transformers.
        layers: their depth.
        channels: channels of the convolutions.
        side: side of the images, which are averaged down to it.
        length: tokens per sequence.
        measured: sequences or images of which the Hessian is taken.
        images: "fashion-mnist", or "patterns" for random patterns, which need no data.
        seeds: seeds of weights and batches.
        models: names of ``MODELS``.
    """

    steps: int = 300
    rows: int = 16
    lr: float = 5e-3
    width: int = 16
    layers: int = 1
    channels: tuple[int, ...] = (8, 8, 16, 16)
    side: int = 14
    length: int = 16
    measured: int = 16
    images: str = "fashion-mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[str, ...] = MODELS


PROFILES = {
    "full": Settings(),
    "smoke": Settings(
        steps=4,
        rows=4,
        width=8,
        layers=1,
        channels=(2, 4),
        side=7,
        length=4,
        measured=8,
        images="patterns",
        seeds=(0,),
        models=("transformer", "cnn"),
    ),
}


def part(profile: str) -> Part:
    """Return the part of a profile."""
    s = PROFILES[profile]
    cells = [
        Cell(f"{model}, seed {seed}", 40.0, lambda m=model, k=seed: measure(s, m, k))
        for model, seed in sorted(itertools.product(s.models, s.seeds), key=lambda pair: pair[0] == MODELS[-1])
    ]
    return Part("spectra", settings_of(s), cells)


class ConvNet(nn.Module):
    """Convolutions of 3 x 3 with ReLU, halved in size after every second one, then the mean and a linear layer.

    Args:
        channels: output channels of every convolution.
        classes: number of classes.
    """

    def __init__(self, channels: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        widths = (1, *channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, side, side] to logits [B, classes]."""
        x = images[:, None]
        for i, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(x))
            x = F.avg_pool2d(x, 2) if i % 2 else x
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class PatchTransformer(nn.Module):
    """The blocks of the GPT of the study on patches of an image; the mean over patches is classified.

    Attention is causal as in the GPT, so that both Transformers differ in their data, first and last layer only.

    Args:
        settings: sizes.
        classes: number of classes.
    """

    def __init__(self, settings: Settings, classes: int = 10) -> None:
        super().__init__()
        self.patch = settings.side // 4 if settings.side >= 8 else 2
        count = (settings.side // self.patch) ** 2
        gpt = build(GPTConfig(classes, count, settings.width, settings.layers, 4), 0)
        self.embedding = nn.Linear(self.patch**2, settings.width)
        self.positions = nn.Embedding(count, settings.width)
        self.blocks, self.norm = gpt.transformer["h"], gpt.transformer["ln_f"]
        self.head = nn.Linear(settings.width, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, side, side] to logits [B, classes]."""
        side = images.shape[-1] // self.patch * self.patch
        patches = F.unfold(images[:, None, :side, :side], self.patch, stride=self.patch).transpose(1, 2)
        x = self.embedding(patches) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def images_of(settings: Settings) -> Batch:
    """Return images as float32 [n, side, side] with mean zero and unit variance, and labels int64 [n].

    Raises:
        FileNotFoundError: Fashion-MNIST is not there.
    """
    if settings.images == "patterns":
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (512,), generator=generator)
        classes = torch.randn(10, settings.side, settings.side, generator=generator)
        return classes[labels] + torch.randn(512, settings.side, settings.side, generator=generator), labels
    pixels, labels = (torch.from_numpy(array.copy()) for array in fashion_mnist())
    small = F.adaptive_avg_pool2d(pixels[:, None].to(torch.float32), settings.side)[:, 0]
    return (small - small.mean()) / small.std(), labels.long()


def subject(settings: Settings, name: str, seed: int) -> tuple[nn.Module, Draw, Batch]:
    """Return a model, step -> its training batch, and the batch of which its Hessian is taken."""
    if name == "transformer":
        tokens = reduced(load("python-stdlib")).train
        model = build(GPTConfig(8, settings.length, settings.width, settings.layers, 4), seed)
        (measured,) = fixed_batches(tokens, 1, settings.measured, settings.length)
        return model, lambda step: batch_at(tokens, seed, step, settings.rows, settings.length), measured
    images, labels = images_of(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(settings.channels) if name == "cnn" else PatchTransformer(settings)
        if isinstance(model, PatchTransformer):
            for layer in model.blocks.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        index = torch.randint(len(images), (settings.rows,), generator=generator)
        return images[index], labels[index]

    return model, draw, (images[: settings.measured], labels[: settings.measured])


def measure(settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """Train one model, and compare the spectra of its weight matrices' blocks before and after training.

    Returns:
        ``final_loss``, ``parameters``, ``names`` (of the blocks), and for every checkpoint ``distance`` (matrix of
        Jensen-Shannon distances) and ``largest`` (largest absolute eigenvalue of every block).
    """
    model, draw, measured = subject(settings, name, seed)
    out: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for checkpoint in CHECKPOINTS:
        if checkpoint == CHECKPOINTS[1]:
            out["final_loss"] = train(settings, model, draw)
        spectra = block_spectra(model, measured)
        out["names"] = list(spectra)
        distance = [[round(js_distance(a, b), 4) for b in spectra.values()] for a in spectra.values()]
        out[checkpoint] = {"distance": distance, "largest": [float(s.abs().max()) for s in spectra.values()]}
    return out


def train(settings: Settings, model: nn.Module, draw: Draw) -> float:
    """Train with AdamW, and return the mean loss of the last tenth of the steps."""
    optimizer = AdamMini(model, settings.lr, (0.9, 0.95), weight_decay=0.1, rules="elementwise")
    losses, warm = [], max(1, settings.steps // 10)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min((step + 1) / warm, (settings.steps - step) / (settings.steps - warm))
        loss = lm_loss(model, draw(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-warm:]) / warm


def block_spectra(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return name -> all eigenvalues of the Hessian in every weight matrix; fused projections count part by part."""
    measured = (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])
    matrix = dense(HessianOperator(model.double(), lm_loss, None, [measured]))
    starts, start = {}, 0
    for name, parameter in model.named_parameters():
        starts[name] = start
        start += parameter.numel()
    spectra: dict[str, Tensor] = {}
    for weight in weight_parts(model):
        index = starts[weight.parameter] + weight.index.flatten()
        inner = matrix[index][:, index]
        spectra[weight.name] = torch.linalg.eigvalsh(0.5 * (inner + inner.T))
    model.float()
    return spectra
