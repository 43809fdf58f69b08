"""Fashion-MNIST from the Debian package ``dataset-fashion-mnist``: 60,000 images of ten classes of clothes."""

from __future__ import annotations

import functools
import gzip
import struct
from pathlib import Path

import numpy as np

from .enwik8 import cache_folder

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28


def folders() -> list[Path]:
    """Return where the package's files may be: installed, or unpacked below the cache folder."""
    return [INSTALLED, cache_folder() / PACKAGE / INSTALLED.relative_to("/")]


@functools.cache
def fashion_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Load the training images.

    Returns:
        (images, uint8 [60000, 28, 28]; labels, uint8 [60000]).

    Raises:
        FileNotFoundError: the Debian package is neither installed nor unpacked in the cache folder.
        ValueError: a file is not what its header says.
    """
    found = next((folder for folder in folders() if (folder / "train-images-idx3-ubyte.gz").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is in none of {[str(f) for f in folders()]}; install the Debian package with `apt-get "
            f"install {PACKAGE}`, or unpack it with `apt-get download {PACKAGE}` and `dpkg -x {PACKAGE}_*.deb "
            f"{cache_folder() / PACKAGE}`"
        )
    return read_idx(found / "train-images-idx3-ubyte.gz"), read_idx(found / "train-labels-idx1-ubyte.gz")


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
