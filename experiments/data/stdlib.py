"""The sources of Python's standard library: text with learnable structure that needs no download."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from .sampler import Corpus

_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}
CLASSES = ("a-z", "A-Z", "0-9", "space", "newline", "punctuation", "brackets and quotes", "underscore and other")
"""The character class of each of the eight tokens of the reduced corpus."""


@functools.cache
def python_stdlib() -> Corpus:
    """Load the sources as bytes, in the order of their paths; every 20th file is held out.

    Raises:
        FileNotFoundError: the interpreter has no source files, for example because its library is zipped.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _SKIP & set(p.relative_to(root).parts[:-1]))
    if len(files) < 100:
        raise FileNotFoundError(
            f"only {len(files)} sources under {root}; data='python-stdlib' needs an interpreter with its .py files: "
            "use data='enwik8' or another Python"
        )
    texts = [path.read_bytes() for path in files]
    train = np.frombuffer(b"".join(t for i, t in enumerate(texts) if i % 20 != 19), dtype=np.uint8)
    validation = np.frombuffer(b"".join(t for i, t in enumerate(texts) if i % 20 == 19), dtype=np.uint8)
    return Corpus(train, validation, 256, _fingerprint(train, validation))


def reduced(corpus: Corpus) -> Corpus:
    """Map a corpus to eight character classes (``CLASSES``), a vocabulary small enough for an exact Hessian."""
    table = np.full(256, 7, dtype=np.uint8)
    for token, characters in enumerate(
        (
            "abcdefghijklmnopqrstuvwxyz",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "0123456789",
            " ",
            "\n",
            ".,:;=+-*/<>!%&|^~@#\\",
            "()[]{}'\"",
        )
    ):
        table[list(characters.encode())] = token
    train, validation = table[corpus.train], table[corpus.validation]
    return Corpus(train, validation, len(CLASSES), _fingerprint(train, validation))


def _fingerprint(train: np.ndarray, validation: np.ndarray) -> str:
    return hashlib.sha256(train.tobytes() + b"|" + validation.tobytes()).hexdigest()
