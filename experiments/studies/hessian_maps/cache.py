"""Cache the results of stages on disk, keyed by their inputs and the source code they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.storage import read_json, require_writable, write_atomic, write_json

logger = logging.getLogger("experiments")
FORMAT_VERSION = 1
Arrays = dict[str, np.ndarray]
_ROOT = Path(__file__).resolve().parents[3]
_SOURCES = ("optimizer", "hessian", "experiments/models", "experiments/data", "experiments/studies/hessian_maps")


def code_fingerprint() -> str:
    """Return a hash of every source file that a stage may run, and of the versions of Python, torch and the format."""
    digest = hashlib.sha256(f"{sys.version}|{torch.__version__}|{FORMAT_VERSION}".encode())
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class StageCache:
    """Results of stages, stored in ``out/data``.

    Args:
        out: the study's output folder.

    Raises:
        PermissionError: the folder cannot be written.
        ValueError: the folder was written with another format version.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "data"
        self.used: dict[str, str] = {}
        self._code = code_fingerprint()
        require_writable(out, "out")
        require_writable(self.folder, "out")
        version = read_json(self.folder / "format.json")
        if version is not None and version != {"format_version": FORMAT_VERSION}:
            raise ValueError(
                f"out={out} was written as {version}, this release writes {FORMAT_VERSION}; choose another --out"
            )
        write_json(self.folder / "format.json", {"format_version": FORMAT_VERSION})

    def get(self, name: str, inputs: Any, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of a stage. They are computed only if the disk has none for the same inputs and code."""
        key = hashlib.sha256(json.dumps([self._code, inputs], sort_keys=True, default=str).encode()).hexdigest()[:12]
        path = self.folder / f"{name}-{key}.npz"
        self.used[name] = path.name
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as stored:
                    return {key: stored[key] for key in stored.files}
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
                logger.warning("%s is damaged (%s): computing it again", path, error)
        arrays = compute()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(path, buffer.getvalue())
        return arrays

    def prune(self) -> None:
        """Delete the files of all stages that were not requested from this object."""
        for path in self.folder.glob("*.npz"):
            if path.name not in self.used.values():
                path.unlink()
