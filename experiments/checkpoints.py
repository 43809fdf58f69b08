"""Checkpoints that are there whole or not at all, written beside the training and read by any number of processes.

A checkpoint is a folder ``checkpoints/step-000100`` of ``torch.distributed.checkpoint``: every process writes what it
holds, under the model's names, so that one process, DDP and FSDP2 on any number of ranks read each other's. It is
written as ``.step-000100.tmp-...``; the last file is a manifest with the size and sha256 of every other one; then one
rename makes it visible. Whatever is found under its final name and does not agree with its manifest is not used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from experiments.parallel import Team
from experiments.storage import sync_folder, write_atomic

logger = logging.getLogger("experiments")
# A single process is what was meant, and torch says so on every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_NAME = re.compile(r"step-[0-9]+")


class State:
    """Model and optimizer as ``torch.distributed.checkpoint`` takes them (its Stateful protocol)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Under the model's parameter names, however it is wrapped."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """The inverse."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=document["model"], optim_state_dict=document["optimizer"]
        )


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are what its manifest says.

    Attributes:
        path: its folder.
        manifest: step, config, processes, progress, files.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken when it was written."""
        return int(self.manifest["step"])


class Checkpoints:
    """The checkpoints of one run.

    Every process of the run makes one and calls its methods in the same order.

    Args:
        folder: where they lie.
        identity: what a checkpoint must have in common with the run to be of use to it (config, data).
        team: the run's processes.
        keep: how many are kept; one more lies there while it is written.

    Attributes:
        failures: writes that did not come to their end.

    Raises:
        ValueError: ``keep`` is not positive.
    """

    def __init__(self, folder: Path, identity: dict[str, str], team: Team, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: how many checkpoints stay on disk")
        self.folder, self.identity, self.team, self.keep = folder, identity, team, keep
        self.failures = 0
        # Writes talk while training does: in a group of their own, so that no message meets another's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._name = team.from_first(secrets.token_hex(4))
        self._pending: tuple[Future[Any], int] | None = None

    # ------------------------------------------------------------------------------------------------- writing

    def save(self, state: State, step: int, progress: dict[str, Any]) -> None:
        """Copy the run to host memory and write it while training goes on; waits for the write before, if any.

        Args:
            state: model and optimizer; may change as soon as this returns.
            step: steps taken.
            progress: JSON-able, given back by ``newest``; may change likewise.
        """
        self.wait()
        progress = copy.deepcopy(progress)  # as the tensors are: what grows later belongs to a later checkpoint
        temporary = self.folder / f".{_folder_name(step)}.tmp-{self._name}"
        document = {"run": state, "rng": {str(self.team.rank): _random_state(self.team.device)}}
        writer = _Writer(temporary, partial(self._commit, temporary, step, progress))
        future = dcp.async_save(
            document, storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )  # fmt: skip
        self._pending = future, step  # type: ignore[assignment]  # no response object was asked for

    def poll(self) -> None:
        """Take note of a write that has ended."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> bool:
        """Wait for the write in flight.

        Returns:
            False where it failed: logged, what it had written removed, the checkpoints before it as they were.
        """
        if self._pending is None:
            return True
        (future, step), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, Exception) as error:  # the former is no Exception
            self.failures += 1
            if self.team.rank == 0:
                logger.error("the checkpoint of step %d was not written, training goes on: %s", step, error)
                self._remove(self.folder / f".{_folder_name(step)}.tmp-{self._name}")
            return False
        return True

    def _commit(self, temporary: Path, step: int, progress: dict[str, Any]) -> None:
        """Once every process has written: the manifest, then the name. Called on the first process."""
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        manifest = {
            "manifest_version": MANIFEST_VERSION, **self.identity, "step": step, "processes": self.team.world,
            "parallel": self.team.kind, "torch": torch.__version__, "progress": progress, "files": files,
        }  # fmt: skip
        manifest["sha256"] = _digest(manifest)
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        target = self.folder / _folder_name(step)
        self._remove(target)
        temporary.rename(target)
        sync_folder(self.folder)
        for old in self._all()[: -self.keep]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Out of sight first: a folder under a checkpoint's name is whole at every moment."""
        if path.is_file() or path.is_symlink():
            path.unlink()
        elif path.exists():
            gone = path if path.name.startswith(".") else path.with_name(f".{path.name}.tmp-gone")
            if gone is not path:
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def clear(self) -> None:
        """Remove them all: the run has ended."""
        if self.team.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- reading

    def _all(self) -> list[Path]:
        """The checkpoints, old ones first; whatever else lies there is nobody's to read or to remove."""
        found = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Found | None:
        """The newest checkpoint that can be trusted. Damaged ones and unfinished writes are logged and removed.

        Raises:
            ValueError: it belongs to another run.
        """
        found = self.team.from_first(self._search() if self.team.rank == 0 else None)
        if isinstance(found, ValueError):
            raise found
        return found

    def _search(self) -> Found | ValueError | None:
        """On the first process alone; an error is handed to all, as no process may wait for one that has gone."""
        for leftover in self.folder.glob(".step-*.tmp-*"):
            logger.warning("%s was never finished: removed", leftover)
            self._remove(leftover)
        checkpoints = self._all()
        for other in sorted(set(self.folder.glob("step-*")) - set(checkpoints)):
            logger.warning("%s is no checkpoint's name (step- and digits): left alone", other)
        for path in reversed(checkpoints):
            try:
                manifest = verified(path)
            except (ValueError, OSError) as error:
                logger.warning("checkpoint %s is torn or damaged (%s): the one before it is used", path, error)
                self._remove(path)
                continue
            for key, own in self.identity.items():
                if manifest.get(key) != own:
                    return ValueError(f"{path} belongs to {key} {manifest.get(key)}, this run has {own}; delete it")
            return Found(path, manifest)
        return None

    def load(self, found: Found, state: State) -> None:
        """Put a checkpoint into model, optimizer and, on as many processes as wrote it, the random generators."""
        document: dict[str, Any] = {"run": state}
        same = found.manifest["processes"] == self.team.world
        if same:
            document["rng"] = {str(self.team.rank): _random_state(self.team.device)}
        reader = dcp.FileSystemReader(found.path)
        dcp.load(document, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        if same:
            _set_random_state(document["rng"][str(self.team.rank)], self.team.device)


class _Writer(dcp.FileSystemWriter):
    """Writes and flushes every file, then calls back on the first process: the last thing a save does.

    What the callback raises reaches all processes as the save's failure.
    """

    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder, sync_files=True)
        self._commit = commit

    def finish(self, metadata: Any, results: Any) -> None:
        """After all processes have written."""
        super().finish(metadata, results)
        self._commit()


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says.

    Raises:
        ValueError: they are not, in words.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError("no manifest")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files, said = manifest["files"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("the manifest cannot be read") from None
    if said != _digest(manifest):
        raise ValueError("the manifest was changed")
    if manifest["manifest_version"] != MANIFEST_VERSION:
        raise ValueError(f"manifest_version={manifest['manifest_version']}, this release reads {MANIFEST_VERSION}")
    for name, wanted in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (path / name).stat().st_size != wanted["bytes"]:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {wanted['bytes']}")
        if _fingerprint(path / name) != wanted:
            raise ValueError(f"{name} has other content")
    return manifest


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators; nothing here draws from Python's or numpy's."""
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else {**state, device.type: torch.cuda.get_rng_state(device)}


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.cuda.set_rng_state(state[device.type], device)
