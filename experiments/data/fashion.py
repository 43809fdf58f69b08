"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 70,000 images of ten classes of clothes.

The files are those of the Debian package ``dataset-fashion-mnist``, or those that torchvision downloads.
"""

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
    """Return where the files may be: the package installed, or below the cache folder unpacked or from torchvision."""
    return [INSTALLED, cache_folder() / PACKAGE / INSTALLED.relative_to("/"), cache_folder() / "FashionMNIST" / "raw"]


SHA256 = {
    "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Pinned hashes of the files' contents, unpacked. The authors' files have the same contents; the Debian package leaves
out the name and the time in the gzip header."""
Part = Literal["train", "t10k"]
"""The files' names of the training images and of the test images."""


@functools.cache
def fashion_mnist(part: Part = "train") -> tuple[np.ndarray, np.ndarray]:
    """Load the training images, or the test images.

    Returns:
        (images, uint8 [60000 or 10000, 28, 28]; labels, uint8 [60000 or 10000]).

    Raises:
        FileNotFoundError: the files are in none of the folders.
        ValueError: a file is not what its header says, or not the pinned one.
    """
    found = next((folder for folder in folders() if (folder / f"{part}-images-idx3-ubyte.gz").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is in none of {[str(f) for f in folders()]}; install the Debian package with `apt-get "
            f"install {PACKAGE}`, or unpack it with `apt-get download {PACKAGE}` and `dpkg -x {PACKAGE}_*.deb "
            f'{cache_folder() / PACKAGE}`; elsewhere, torchvision downloads it: `python -c "from torchvision.datasets '
            f"import FashionMNIST; FashionMNIST('{cache_folder()}', download=True)\"`"
        )
    images, labels = found / f"{part}-images-idx3-ubyte.gz", found / f"{part}-labels-idx1-ubyte.gz"
    arrays = read_idx(images), read_idx(labels)
    for name, path in ((f"{part}-images", images), (f"{part}-labels", labels)):
        digest = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        if digest != SHA256[name]:
            raise ValueError(
                f"{path} unpacks to sha256 {digest}, but {SHA256[name]} is pinned; unpack the package {PACKAGE} again, "
                "or delete the file and download it again"
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
