"""Fashion-MNIST from the Debian package ``dataset-fashion-mnist``: 70,000 images of ten classes of clothes."""

from __future__ import annotations

import functools
import gzip
import hashlib
import struct
from pathlib import Path
from typing import Literal

import numpy as np

from .enwik8 import cache_folder

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28
"""Height and width of an image."""
KINDS_OF_CLOTHES = 10


def folders() -> list[Path]:
    """Return where the package's files may be: installed, or unpacked below the cache folder."""
    return [INSTALLED, cache_folder() / PACKAGE / INSTALLED.relative_to("/")]


SHA256 = {
    "train-images": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
"""Pinned hashes of the files, without their endings."""
Part = Literal["train", "t10k"]
"""The files' names of the training images and of the test images."""


@functools.cache
def fashion_mnist(part: Part = "train") -> tuple[np.ndarray, np.ndarray]:
    """Load the training images, or the test images.

    Returns:
        (images, uint8 [60000 or 10000, 28, 28]; labels, uint8 [60000 or 10000]).

    Raises:
        FileNotFoundError: the Debian package is neither installed nor unpacked in the cache folder.
        ValueError: a file is not what its header says, or not the pinned one.
    """
    found = next((folder for folder in folders() if (folder / f"{part}-images-idx3-ubyte.gz").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is in none of {[str(f) for f in folders()]}; install the Debian package with `apt-get "
            f"install {PACKAGE}`, or unpack it with `apt-get download {PACKAGE}` and `dpkg -x {PACKAGE}_*.deb "
            f"{cache_folder() / PACKAGE}`"
        )
    images, labels = found / f"{part}-images-idx3-ubyte.gz", found / f"{part}-labels-idx1-ubyte.gz"
    arrays = read_idx(images), read_idx(labels)
    for name, path in ((f"{part}-images", images), (f"{part}-labels", labels)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHA256[name]:
            raise ValueError(
                f"{path} has sha256 {digest}, but {SHA256[name]} is pinned; unpack the package {PACKAGE} again"
            )
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: a magic number with the number of axes, the sizes, and the values.

    Raises:
        ValueError: the file's length does not match its header.
    """
    content = gzip.decompress(path.read_bytes())
    kind, axes = content[2], content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    if kind != 8 or values.size != np.prod(shape):
        raise ValueError(f"{path} is no idx file of bytes of shape {shape}; unpack the package {PACKAGE} again")
    return values.reshape(shape)
