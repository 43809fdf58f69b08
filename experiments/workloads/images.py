"""Batches of images: pieces, shifts and mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

SHIFT = 2
"""By how many pixels a training image is moved at most."""


def require_data(name: str, known: Sequence[str]) -> None:
    """Check the name of a set of images.

    Raises:
        ValueError: it is none of the known ones.
    """
    if name not in known:
        raise ValueError(f"data={name!r} is no set of images of this workload; choose from {tuple(known)}")


def pieces(batch: tuple[Tensor, ...], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield a batch in pieces of at most ``rows`` rows."""
    for start in range(0, len(batch[0]), rows):
        yield tuple(part[start : start + rows] for part in batch)


def mirrored(images: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return a copy of images [n, side, side, ...] of which half, chosen at random, are mirror images."""
    images, mirror = images.copy(), draw.random(len(images)) < 0.5
    images[mirror] = images[mirror, :, ::-1]
    return images


def shifted(images: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Mirror half of the images and move each by up to ``SHIFT`` pixels, filled with black.

    Args:
        images: uint8 [n, side, side].
        draw: generator.
    """
    padded = mirrored(np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT))), draw)
    down, right = draw.integers(0, 2 * SHIFT + 1, (2, len(images)))
    side = np.arange(images.shape[1])
    return padded[
        np.arange(len(images))[:, None, None], down[:, None, None] + side[:, None], right[:, None, None] + side
    ]


def to_labels(labels: np.ndarray) -> Tensor:
    """Return labels as int64, as ``torch`` wants them."""
    return torch.from_numpy(labels.astype(np.int64))
