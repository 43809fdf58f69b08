"""Compile the native loop once per machine, cache the library, and log one line if that is not possible."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ...moments import FORMATS

logger = logging.getLogger("optimizer")

_SOURCE = Path(__file__).with_name("kernel.cpp")
_HEADERS = ("dense.h", "factored.h", "low_bit.h", "low_bit_any.h", "numbers.h", "strided.h", "tensors.h")
_FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
if platform.machine() in ("x86_64", "AMD64"):
    # Without this flag compilers use vectors of 256 bits, because older processors are slower with 512.
    _FLAGS = (*_FLAGS, "-mprefer-vector-width=512")
_ABI = 4
_TIMEOUT = 300  # seconds that one compilation may last


def available() -> bool:
    """Whether the native loop can be used; the first call may compile it, which takes seconds."""
    return library() is not None


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None after logging one line that says why it cannot be used."""
    if os.environ.get("ADAM_MINI_NATIVE") == "0":
        logger.info("the native step is switched off (ADAM_MINI_NATIVE=0); steps are taken in eager torch operations")
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        logger.warning(
            "no C++ compiler (g++, clang++, or CXX) for the native step; steps are taken in eager torch operations, "
            "which are slower and give the same numbers"
        )
        return None
    failures = []
    for folder in _folders():
        try:
            return _load(_built(Path(folder), compiler))
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            failures.append(f"{folder}: {_first_line(error)}{_saved_output(error)}")
    logger.warning(
        "the native step cannot be built (%s); steps are taken in eager torch operations, which are slower and give "
        "the same numbers",
        "; ".join(failures),
    )
    return None


def _folders() -> Iterator[str]:
    """Yield folders to try: ADAM_MINI_CACHE, the user's cache, and a folder of the user in the temporary directory."""
    if chosen := os.environ.get("ADAM_MINI_CACHE"):
        yield chosen
    yield os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adam_mini_lab")
    yield os.path.join(tempfile.gettempdir(), f"adam_mini_lab-{os.getuid() if hasattr(os, 'getuid') else 'user'}")


def _key(compiler: str) -> str:
    """Return a hash of what the library depends on: source, flags, compiler and, for -march=native, the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT).stdout
    sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *map(_SOURCE.with_name, _HEADERS))]
    facts = [*sources, *_flags(), compiler, version, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _flags() -> list[str]:
    """Return the compiler flags, with the formats of ``moments``; ADAM_MINI_CXXFLAGS is last, so it overrides."""
    formats = [
        f"-DADAM_MINI_{format.name.upper()}_{what}={value}"
        for format in FORMATS.values()
        for what, value in (("BLOCK", format.block), ("LEVELS", format.levels))
    ]
    return [*_FLAGS, *formats, *shlex.split(os.environ.get("ADAM_MINI_CXXFLAGS", ""))]


def _processor() -> str:
    """Return a text that lists the instruction sets of this processor, if the system provides one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _built(folder: Path, compiler: str) -> Path:
    """Return the path of the library in ``folder``; compile it if there is no undamaged file."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{folder} belongs to another user")
    key = _key(compiler)
    with _locked(folder / f"step-{key}.lock"):
        for cached in folder.glob(f"step-{key}-*.so"):
            if _undamaged(cached):
                return cached
        return _compiled(folder, key, compiler)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock ``path``, so that one process compiles and all others wait; without file locks, each process compiles."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context(open(path, "ab"))
            deadline = time.monotonic() + _TIMEOUT
            while time.monotonic() < deadline:
                try:
                    # The lock is released when the file is closed or the process ends.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield


def _compiled(folder: Path, key: str, compiler: str) -> Path:
    """Compile a new library; the file appears under its final name only when it is complete."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *_flags(), "-o", temporary, str(_SOURCE)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        os.chmod(temporary, 0o700)
        target = folder / f"step-{key}-{_digest(Path(temporary))}.so"
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return target


def _digest(path: Path) -> str:
    """Return a hash of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _undamaged(path: Path) -> bool:
    """Whether a cached file has the bytes that were written; if not, delete it.

    Loading a truncated library would crash the process.
    """
    try:
        undamaged = path.stem.rpartition("-")[2] == _digest(path)
    except OSError:
        return False
    if not undamaged:
        logger.info("the cached %s is damaged; building it again", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return undamaged


def _load(path: Path) -> ctypes.CDLL:
    """Load a compiled library and declare the types of its functions."""
    loaded = ctypes.CDLL(str(path))
    loaded.adam_mini_abi.restype = ctypes.c_int64
    if loaded.adam_mini_abi() != _ABI:
        raise OSError(f"{path} has interface {loaded.adam_mini_abi()}, not {_ABI}")
    i, d = ctypes.c_int64, ctypes.c_double
    loaded.adam_mini_step.argtypes = [i, ctypes.c_void_p, ctypes.c_void_p, d, d, d, d, d, d, i, ctypes.c_void_p]
    loaded.adam_mini_step.restype = None
    return loaded


def _first_line(error: BaseException) -> str:
    """Return the error in one line, with the first line of a compiler's output."""
    output = (getattr(error, "stderr", None) or "").strip().splitlines()
    return f"{type(error).__name__}: {output[0] if output else error}"


def _saved_output(error: BaseException) -> str:
    """Save a compiler's output to a file and return words that name it; empty if the output has at most one line."""
    output = getattr(error, "stderr", None) or ""
    if len(output.strip().splitlines()) < 2:
        return ""
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="adam_mini_lab-build-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(output if isinstance(output, str) else output.decode(errors="replace"))
        return f" (full output: {path})"
    return ""
