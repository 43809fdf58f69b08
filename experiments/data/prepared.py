"""Corpora that ``experiments.data.prepare`` has tokenised: two files of token ids that are mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .registry import cache_folder
from .sampler import Corpus

VERSION = 1
PARTS = ("train", "validation")


def folder_of(name: str) -> Path:
    """Return the folder of a prepared corpus: ``train.bin``, ``validation.bin`` and ``meta.json``."""
    return cache_folder() / "tokens" / name


def is_prepared(name: str) -> bool:
    """Whether a corpus of this name was prepared completely; its folder appears when it is."""
    return (folder_of(name) / "meta.json").is_file()


def prepared(name: str) -> Corpus:
    """Map a prepared corpus into memory; nothing of it is read before it is needed.

    Raises:
        RuntimeError: the files are not as long as ``meta.json`` says, or have another format.
    """
    folder = folder_of(name)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            raise ValueError(f"its version is {meta['version']}, this release reads {VERSION}")
        dtype, counts = np.dtype(meta["dtype"]), [int(meta["tokens"][part]) for part in PARTS]
        vocab, fingerprint = int(meta["vocab"]), str(meta["fingerprint"])
        for part, count in zip(PARTS, counts, strict=True):
            size = (folder / f"{part}.bin").stat().st_size
            if size != count * dtype.itemsize:
                raise ValueError(f"{part}.bin has {size} bytes, not {count * dtype.itemsize}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{folder} is damaged ({error}); delete it and prepare it again") from error
    train, validation = (
        np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") if count else np.zeros(0, dtype)
        for part, count in zip(PARTS, counts, strict=True)
    )
    return Corpus(train, validation, vocab, fingerprint)
