"""Denoising diffusion (Ho et al., arXiv 2006.11239): diffusers' UNet or DiT predicts the noise in an image.

A run is judged by the squared error of the predicted noise on held-out images. Their noise and their timesteps are the
same in every run. Seed 0 leaves samples, drawn by DDIM without noise (Song et al., arXiv 2010.02502).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data import cifar, epoch_rows, fashion_mnist
from experiments.data.fashion import KINDS_OF_CLOTHES, SHA256, SIDE

from .images import mirrored, pieces, require_data, to_labels
from .libraries import library
from .workload import CONVOLUTION_ARMS, Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

Network = Literal["unet", "dit"]
CANVAS = 32
"""Height and width of the images that networks see: images of clothes have a black margin of two pixels."""
MARGIN = (CANVAS - SIDE) // 2
HEAD = 64
TIMESTEPS = 1000
SCHEDULE = {"num_train_timesteps": TIMESTEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
"""The noise of each timestep (Ho et al., section 4)."""
SAMPLES, SAMPLING_STEPS = 16, 25
FIXED = 2**63 + 2006
"""Key of the noise of held-out images and of samples; no seed of a run is as large."""


@dataclass(frozen=True)
class Diffusion:
    """A network of diffusers that predicts noise.

    Attributes:
        network: ``unet``, or ``dit`` (Peebles and Xie, arXiv 2212.09748), which is told the class of an image.
        width: channels of the UNet's first stage, of which further stages have twice as many; or width of the DiT.
        stages: resolutions of the UNet, each half of the one before.
        blocks: residual blocks of each of them.
        attention: side of the maps to which the UNet applies attention, beside its smallest one.
        dropout: dropout of the UNet.
        depth: blocks of the DiT.
        patch: side of the DiT's patches, in pixels.
    """

    network: Network = "unet"
    width: int = 32
    stages: int = 3
    blocks: int = 1
    attention: int = 8
    dropout: float = 0.0
    depth: int = 6
    patch: int = 4

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a word is unknown, or a size does not fit the images.
        """
        if self.network not in get_args(Network):
            raise ValueError(f"network={self.network!r} is unknown; choose from {get_args(Network)}")
        for name in ("width", "stages", "blocks", "attention", "depth", "patch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if CANVAS % self.patch:
            raise ValueError(f"patch={self.patch} must divide the side of an image, {CANVAS}")
        if CANVAS % 2 ** (self.stages - 1):
            raise ValueError(f"stages={self.stages} is too many: a side of {CANVAS} can be halved five times")
        if self.attention not in self.sides:
            raise ValueError(f"attention={self.attention} must be the side of a stage, one of {self.sides}")
        if self.network == "unet" and self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4, the channels of a group")
        if self.network == "dit" and self.width % HEAD:
            raise ValueError(f"width={self.width} must be a multiple of {HEAD}, the width of a head")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the UNet's maps, stage by stage."""
        return tuple(CANVAS >> stage for stage in range(self.stages))

    def fetch(self, config: TrainConfig) -> None:
        """Check that diffusers and the images are there.

        Raises:
            FileNotFoundError: the images are not there.
            RuntimeError: diffusers is not installed, or an archive is not the pinned one.
            ValueError: the data is unknown, or a file is damaged.
        """
        require_data(config.data, DATA)
        library("diffusers", "a diffusion model")
        load(config.data)

    def task(self, config: TrainConfig, device: torch.device) -> Denoising:
        """Return the task that trains it."""
        return Denoising(config, self, device)


def load(data: str, *, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Load training images or held-out ones.

    Returns:
        (images with a black margin where they are smaller, uint8 [n, 32, 32, channels]; their classes, uint8 [n]).
    """
    if data == "cifar10":
        return cifar.cifar10("test" if held_out else "train")
    images, labels = fashion_mnist("t10k" if held_out else "train")
    return np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))[..., None], labels


DATA = {"fashion-mnist": SHA256["train-images"], "cifar10": cifar.SHA256}
"""Name -> hash of the data."""


def build(kind: Diffusion, seed: int, channels: int = 1) -> nn.Module:
    """Build a network; its weights are a function of the seed.

    Args:
        kind: its sizes.
        seed: seed of the weights.
        channels: channels of an image.
    """
    library("diffusers", "a diffusion model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _dit(kind, channels) if kind.network == "dit" else _unet(kind, channels)


def _unet(kind: Diffusion, channels: int) -> nn.Module:
    make = library("diffusers.models.unets.unet_2d", "a diffusion model").UNet2DModel
    attends = [side == kind.attention for side in kind.sides]
    return make(
        sample_size=CANVAS,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(kind.width, *[2 * kind.width] * (kind.stages - 1)),
        layers_per_block=kind.blocks,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in attends[::-1]),
        attention_head_dim=None,  # one head, as in Ho et al.
        norm_num_groups=min(32, kind.width // 4),
        dropout=kind.dropout,
    )


def _dit(kind: Diffusion, channels: int) -> nn.Module:
    make = library("diffusers.models.transformers.dit_transformer_2d", "a diffusion model").DiTTransformer2DModel
    model = make(
        num_attention_heads=kind.width // HEAD,
        attention_head_dim=HEAD,
        in_channels=channels,
        out_channels=channels,
        num_layers=kind.depth,
        sample_size=CANVAS,
        patch_size=kind.patch,
        num_embeds_ada_norm=KINDS_OF_CLOTHES,
    )
    # The paper's DiT starts as the identity, and predicts zero; diffusers only loads weights that were trained so.
    for layer in [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class Denoising:
    """Mean squared error of the predicted noise, in training and on the first held-out images.

    Their number is the config's ``eval_batches`` times ``batch``. Their timesteps are evenly spread, so every level of
    noise has its share.

    Args:
        config: the run.
        kind: the network.
        device: where held-out images are kept.
    """

    def __init__(self, config: TrainConfig, kind: Diffusion, device: torch.device) -> None:
        require_data(config.data, DATA)
        self.config, self.kind, self.device = config, kind, device
        self.images, self.labels = load(config.data)
        self.model = build(kind, config.seed, self.images.shape[-1])
        self.schedule = library("diffusers", "a diffusion model").DDPMScheduler(**SCHEDULE)
        self.fingerprint = DATA[config.data]
        pixels, labels = (part[: config.eval_batches * config.batch] for part in load(config.data, held_out=True))
        images = to_canvas(pixels)
        noise = np.random.Generator(np.random.Philox(key=FIXED)).standard_normal(images.shape, dtype=np.float32)
        timesteps = (2 * np.arange(len(images)) + 1) * TIMESTEPS // (2 * len(images))
        batch = images, to_labels(labels), torch.from_numpy(noise), to_labels(timesteps)
        self.held_out = tuple(part.to(device) for part in batch)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return (images [batch, channels, 32, 32], their classes, noise like images, timesteps) of a step."""
        rows, draw = epoch_rows(len(self.images), self.config.seed, step, self.config.batch)
        images = to_canvas(mirrored(self.images[rows], draw))
        noise = draw.standard_normal(tuple(images.shape), dtype=np.float32)
        timesteps = draw.integers(0, TIMESTEPS, len(rows))
        return images, to_labels(self.labels[rows]), torch.from_numpy(noise), to_labels(timesteps)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean squared error over rows and pixels; a prediction of zero has 1."""
        images, labels, noise, timesteps = batch
        noisy = self.schedule.add_noise(images, noise, timesteps)
        return (self._predict(module, noisy, timesteps, labels) - noise).square().mean()

    def _predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        more = {"class_labels": labels} if self.kind.network == "dit" else {}
        return module(noisy, timestep=timesteps, **more).sample.float()

    @torch.no_grad()
    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the mean squared error on the held-out images."""
        self.model.eval()
        total = 0.0
        for piece in pieces(self.held_out, rows or 128):
            with casting():
                total += self.loss(self.model, piece).item() * len(piece[0])
        self.model.train()
        return {"val_loss": total / len(self.held_out[0])}

    @torch.no_grad()
    def artefacts(self, *, casting: Casting) -> dict[str, Any]:
        """Return sixteen samples of a run of seed 0, the i-th from the same noise and of the same class in every run.

        ``base64`` decodes to uint8 [count, 28, 28], or [count, 32, 32, 3] in colour.
        """
        if self.config.seed:
            return {}
        self.model.eval()
        schedule = library("diffusers", "a diffusion model").DDIMScheduler(**SCHEDULE)
        schedule.set_timesteps(SAMPLING_STEPS)
        shape = (SAMPLES, self.images.shape[-1], CANVAS, CANVAS)
        noise = np.random.Generator(np.random.Philox(key=FIXED + 1)).standard_normal(shape, dtype=np.float32)
        images, labels = torch.from_numpy(noise).to(self.device), torch.arange(SAMPLES, device=self.device)
        for timestep in schedule.timesteps:
            with casting():
                at = timestep.expand(SAMPLES).to(self.device)
                predicted = self._predict(self.model, images, at, labels % KINDS_OF_CLOTHES)
            images = schedule.step(predicted, int(timestep), images).prev_sample
        self.model.train()
        return {"samples": as_document(to_bytes(images))}


def to_canvas(images: np.ndarray) -> Tensor:
    """Return bytes [n, 32, 32, channels] as floats in [-1, 1], [n, channels, 32, 32]."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_bytes(canvas: Tensor) -> np.ndarray:
    """Return floats as bytes, values beyond black and white cut off.

    Returns:
        uint8 [n, 28, 28] of [n, 1, 32, 32], without the margin; uint8 [n, 32, 32, channels] of several channels.
    """
    pixels = ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels if pixels.shape[-1] > 1 else pixels[:, MARGIN:-MARGIN, MARGIN:-MARGIN, 0]


def as_document(images: np.ndarray) -> dict[str, Any]:
    """Return bytes [n, height, width] as a document."""
    return {"shape": list(images.shape), "dtype": "uint8", "base64": base64.b64encode(images.tobytes()).decode()}


_RUN: dict[str, Any] = {
    "data": "fashion-mnist",
    "batch": 32,
    "seq_len": 1,
    "steps": 500,
    "eval_every": 100,
    "eval_batches": 16,
    "weight_decay": 0.01,
    "warmup": 0.05,
    "precision": "bf16",
}
_SMOKE: dict[str, Any] = {"batch": 8, "steps": 4, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2}
_RATES = (3e-4, 1e-3, 3e-3)
# Ho et al., appendix B, and github.com/hojonathanho/diffusion, scripts/run_cifar.py: 35.7M parameters, attention at a
# side of 16, dropout 0.1, mirror images; 800,000 steps of 128 images, Adam (no weight decay, betas (0.9, 0.999)) at
# 2e-4 after 5,000 steps of warm-up, gradients clipped to norm 1, fp32. Left out: averaged weights. Ours: the rate,
# constant there, falls to 0.999 of itself; the validation, on 2,048 images every 5,000 steps.
DDPM_CIFAR10: dict[str, Any] = {
    "model": Diffusion(width=128, stages=4, blocks=2, attention=16, dropout=0.1),
    "data": "cifar10",
    "batch": 128,
    "steps": 800_000,
    "lr": 2e-4,
    "lr_end": 0.999,
    "warmup": 5_000 / 800_000,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "clip": 1.0,
    "eval_every": 5_000,
    "checkpoint_every": 5_000,
    "precision": "fp32",
}
DIFFUSION = Workload(
    {**_RUN, "model": Diffusion()},
    {**_SMOKE, "model": Diffusion(width=8, stages=2, attention=16)},
    _RATES,
    CONVOLUTION_ARMS,
    full={"ddpm_cifar10": DDPM_CIFAR10},
)
DIT = Workload(
    {**_RUN, "steps": 800, "model": Diffusion("dit", width=128)},
    {**_SMOKE, "model": Diffusion("dit", width=64, depth=1)},
    _RATES,
)
