"""Processes that start at once: a server imports torch and the library, and every process is a fork of it.

A fresh interpreter needs two to six seconds for these imports. A test of what only a fresh interpreter shows (its
imports, its environment variables, its hash seed) starts one with ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["optimizer", "tests.sharding.parallel", "experiments.train", "transformers.models.gpt2.modeling_gpt2",
             "transformers.models.mixtral.modeling_mixtral"]  # fmt: skip
"""Modules that the server imports; none of them starts a thread."""


class Forked:
    """A forked process, with the attributes of ``subprocess.Popen`` that the tests use."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def poll(self) -> int | None:
        """The exit status, None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: the process has not ended by then.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def start(function: Callable[..., Any], *arguments: Any, output: Path) -> Forked:
    """Call a function of a module in a process of its own; all that it prints goes to a file."""
    process = _server().Process(target=_call, args=(output, function, arguments), daemon=True)
    process.start()
    return Forked(process)


def run_module(
    module: str, *arguments: str, output: Path, folder: Path = ROOT, environment: dict[str, str] | None = None
) -> Forked:
    """Do what ``python -m module arguments`` does, in a process of its own with a current directory."""
    return start(_run_module, module, arguments, folder, environment or {}, output=output)


def _run_module(module: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _call(output: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)
