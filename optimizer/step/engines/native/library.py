"""Build the native loop once per machine, keep it in a cache, and say once when that is not possible."""

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
_HEADERS = ("dense.h", "low_bit.h", "numbers.h", "strided.h", "tensors.h")
_FLAGS: tuple[str, ...] = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",
)  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS = (*_FLAGS, "-mprefer-vector-width=512")  # compilers prefer 256 bits for the sake of older processors
_ABI = 2
_PATIENCE = 300  # seconds for a compiler


def available() -> bool:
    """Whether the native loop can be used; the first question may compile it (seconds)."""
    return library() is not None


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None, with one line in the log that says why."""
    if os.environ.get("ADAM_MINI_NATIVE") == "0":
        logger.info("the native step is switched off (ADAM_MINI_NATIVE=0); steps are taken in eager torch operations")
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        logger.warning(
            "no C++ compiler (g++, clang++, or CXX) for the native step; steps are taken in eager torch operations: "
            "slower, with the same numbers"
        )
        return None
    complaints = []
    for folder in _folders():
        try:
            return _load(_built(Path(folder), compiler))
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            complaints.append(f"{folder}: {_line(error)}{_kept(error)}")
    logger.warning(
        "the native step cannot be built (%s); steps are taken in eager torch operations: slower, the same numbers",
        "; ".join(complaints),
    )
    return None


def _folders() -> Iterator[str]:
    """Where to keep it: the user's choice, the user's cache, a folder of one's own in /tmp."""
    if chosen := os.environ.get("ADAM_MINI_CACHE"):
        yield chosen
    yield os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adam_mini_lab")
    yield os.path.join(tempfile.gettempdir(), f"adam_mini_lab-{os.getuid() if hasattr(os, 'getuid') else 'user'}")


def _key(compiler: str) -> str:
    """What the built file depends on: source, flags, compiler, and, for -march=native, the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE).stdout
    sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *map(_SOURCE.with_name, _HEADERS))]
    facts = [*sources, *_flags(), compiler, version, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _flags() -> list[str]:
    """Ours, then the user's (ADAM_MINI_CXXFLAGS), which win. The few-bit formats are those of ``moments``."""
    formats = [
        f"-DADAM_MINI_{kept.name.upper()}_{what}={value}"
        for kept in FORMATS.values()
        for what, value in (("BLOCK", kept.block), ("LEVELS", kept.levels))
    ]
    return [*_FLAGS, *formats, *shlex.split(os.environ.get("ADAM_MINI_CXXFLAGS", ""))]


def _processor() -> str:
    """The instruction sets of this processor, where the system says them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _built(folder: Path, compiler: str) -> Path:
    """The library's file, compiled if it is not there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid not in (os.getuid(), 0):
        raise PermissionError(f"{folder} belongs to somebody else")
    key = _key(compiler)
    with _alone(folder / f"step-{key}.lock"):
        for found in folder.glob(f"step-{key}-*.so"):
            if _whole(found):
                return found
        return _compiled(folder, key, compiler)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process compile and the others wait for it; where files cannot be locked, each compiles its own."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context(open(path, "ab"))
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the file is closed, or we die
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield


def _compiled(folder: Path, key: str, compiler: str) -> Path:
    """A new file, whole or not at all."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *_flags(), "-o", temporary, str(_SOURCE)],
            check=True, capture_output=True, text=True, timeout=_PATIENCE,
        )  # fmt: skip
        os.chmod(temporary, 0o700)
        target = folder / f"step-{key}-{_digest(Path(temporary))}.so"
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return target


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Whether a cached file is what was written: the loader maps it as it is, and a torn one would end the process."""
    try:
        whole = path.stem.rpartition("-")[2] == _digest(path)
    except OSError:
        return False
    if not whole:
        logger.info("the cached %s is damaged; building it again", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return whole


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.adam_mini_abi.restype = ctypes.c_int64
    if loaded.adam_mini_abi() != _ABI:
        raise OSError(f"{path} has interface {loaded.adam_mini_abi()}, not {_ABI}")
    i, d = ctypes.c_int64, ctypes.c_double
    loaded.adam_mini_step.argtypes = [i, ctypes.c_void_p, ctypes.c_void_p, d, d, d, d, d, d, i]
    loaded.adam_mini_step.restype = None
    return loaded


def _line(error: BaseException) -> str:
    """The error in one line, a compiler's first complaint included."""
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else error}"


def _kept(error: BaseException) -> str:
    """Where all that the compiler said can be read, for the log; nothing where it said at most one line."""
    said = getattr(error, "stderr", None) or ""
    if len(said.strip().splitlines()) < 2:
        return ""
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="adam_mini_lab-build-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(said if isinstance(said, str) else said.decode(errors="replace"))
        return f" (all of it: {path})"
    return ""
