"""Files of a run: written atomically, and checked when they are read."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimizer.partition.documents import parse_json


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically: a reader sees the old file or the new one, never a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # On a full disk, the partial file would keep the disk full.
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Flush a folder's directory entries, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON, atomically."""
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; return None if it does not exist.

    Raises:
        ValueError: the file is not JSON, or an object in it has a key twice.
    """
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to run it again") from error


def require_writable(folder: Path, argument: str) -> None:
    """Create a results folder and check that files can be created in it.

    Args:
        folder: the folder.
        argument: name of the command-line argument, for the message.

    Raises:
        PermissionError: the folder or a file in it cannot be created.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"{argument}={folder} cannot be written ({error}); choose another folder with --{argument}"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder, so that no other process works on it. The lock ends with the process at the latest.

    Raises:
        SystemExit: another process has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder} is being run by another process; wait for it") from None
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a run uses, for its results folder."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
