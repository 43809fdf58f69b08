"""Files of a run: written whole or not at all, checked when they are read back."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("experiments")


def write_atomic(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, document: Any) -> None:
    """JSON, indented, atomic."""
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """JSON, or None where there is no such file.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to run it again") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """torch.save with the content's sha256 in front."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none or it was cut short (said in the log)."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if len(raw) < 32 or hashlib.sha256(raw[32:]).digest() != raw[:32]:
        logger.warning("checkpoint %s is torn or damaged: starting this run from the beginning", path)
        return None
    loaded: dict[str, Any] = torch.load(io.BytesIO(raw[32:]), weights_only=True)
    return loaded


def environment() -> dict[str, Any]:
    """What a run ran on, for its results folder."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
