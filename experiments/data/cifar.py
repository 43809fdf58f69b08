"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of ten classes, from the archive of its author's page."""

from __future__ import annotations

import functools
import tarfile
from typing import Literal

import numpy as np

from .registry import cache_folder, require_hash

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
SIDE, CHANNELS = 32, 3
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


@functools.cache
def cifar10(part: Literal["train", "test"] = "train") -> tuple[np.ndarray, np.ndarray]:
    """Load the training images, or the test images. Nothing is downloaded.

    Returns:
        (images, uint8 [50000 or 10000, 32, 32, 3]; labels, uint8 [50000 or 10000]).

    Raises:
        FileNotFoundError: the archive is not in the cache folder.
        RuntimeError: the archive is not the pinned one.
    """
    path = cache_folder() / ARCHIVE
    if not path.is_file():
        raise FileNotFoundError(f"data='cifar10' needs {path}; download it from {URL} (170 MB) and put it there")
    require_hash(path, SHA256)
    with tarfile.open(path) as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive.getmembers()}
        content = b"".join(archive.extractfile(members[name]).read() for name in FILES[part])  # type: ignore[union-attr]
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + CHANNELS * SIDE * SIDE)
    images = records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]
