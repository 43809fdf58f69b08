"""Atomic checkpoints, written in the background during training and readable by any number of processes.

A checkpoint is a folder ``checkpoints/step-000100`` of ``torch.distributed.checkpoint``. Every process writes its
shards under the model's parameter names, so a single process, DDP and FSDP2 on any number of ranks can read each
other's checkpoints. The folder is written as ``.step-000100.tmp-...``. Its last file is a manifest with the size and
sha256 of every other file. One rename then gives the folder its final name. A folder under a final name that does not
agree with its manifest is not used.
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
# torch warns at every save and load of a single process, which is a normal way to run.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_NAME = re.compile(r"step-[0-9]+")


class State:
    """Model and optimizer under the Stateful protocol of ``torch.distributed.checkpoint``."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return both state dicts, with the unwrapped model's parameter names."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=document["model"], optim_state_dict=document["optimizer"]
        )


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files agree with its manifest.

    Attributes:
        path: the checkpoint's folder.
        manifest: step, config, processes, progress and files.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps before the checkpoint was written."""
        return int(self.manifest["step"])


class Checkpoints:
    """The checkpoints of one run.

    Every process of the run creates one instance and calls its methods in the same order.

    Args:
        folder: folder of the checkpoints.
        identity: entries of the manifest (config, data) that must be equal to the run's for a checkpoint to be loaded.
        team: the run's processes.
        keep: number of checkpoints that stay on disk; one more exists while it is being written.

    Attributes:
        failures: number of writes that failed.

    Raises:
        ValueError: ``keep`` is not positive.
    """

    def __init__(self, folder: Path, identity: dict[str, str], team: Team, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: how many checkpoints stay on disk")
        self.folder, self.identity, self.team, self.keep = folder, identity, team, keep
        self.failures = 0
        # Writes communicate during training, so they need a process group that training does not use.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._name = team.from_first(secrets.token_hex(4))
        self._pending: tuple[Future[Any], int] | None = None

    # ------------------------------------------------------------------------------------------------- writing

    def save(self, state: State, step: int, progress: dict[str, Any]) -> None:
        """Copy the run to host memory and write it in the background; first wait for the previous write to end.

        Args:
            state: model and optimizer; the caller may change them once this method has returned.
            step: number of optimizer steps so far.
            progress: JSON-able document for the manifest; the caller may change it once this method has returned.
        """
        self.wait()
        progress = copy.deepcopy(progress)  # The caller appends to it while the write is under way.
        temporary = self.folder / f".{_folder_name(step)}.tmp-{self._name}"
        document = {"run": state, "rng": {str(self.team.rank): _random_state(self.team.device)}}
        writer = _Writer(temporary, partial(self._commit, temporary, step, progress))
        future = dcp.async_save(document, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._pending = future, step  # type: ignore[assignment]  # a Future, as staging is not asynchronous

    def poll(self) -> None:
        """Handle the result of the pending write if it has ended."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> bool:
        """Wait for the pending write.

        Returns:
            False if it failed. The failure is then logged, its files are removed, and earlier checkpoints remain.
        """
        if self._pending is None:
            return True
        (future, step), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, Exception) as error:  # CheckpointException derives from BaseException.
            self.failures += 1
            if self.team.rank == 0:
                logger.error("the checkpoint of step %d was not written, training goes on: %s", step, error)
                self._remove(self.folder / f".{_folder_name(step)}.tmp-{self._name}")
            return False
        return True

    def _commit(self, temporary: Path, step: int, progress: dict[str, Any]) -> None:
        """Write the manifest and rename the folder. Called on the first process after every process has written."""
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            **self.identity,
            "step": step,
            "processes": self.team.world,
            "parallel": self.team.kind,
            "torch": torch.__version__,
            "progress": progress,
            "files": files,
        }
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
        """Remove a file or folder. A checkpoint is renamed first, so that a final name never has a partial folder."""
        if path.is_file() or path.is_symlink():
            path.unlink()
        elif path.exists():
            hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.tmp-gone")
            if hidden is not path:
                shutil.rmtree(hidden, ignore_errors=True)
                path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints after the run has ended."""
        if self.team.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- reading

    def _all(self) -> list[Path]:
        """Return the checkpoints, oldest first. Folders with other names are ignored."""
        folders = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> VerifiedCheckpoint | None:
        """Return the newest checkpoint that agrees with its manifest, or None if there is none.

        Damaged checkpoints and unfinished writes are logged and removed.

        Raises:
            ValueError: the checkpoint belongs to another run.
        """
        checkpoint = self.team.from_first(self._search() if self.team.rank == 0 else None)
        if isinstance(checkpoint, ValueError):
            raise checkpoint
        return checkpoint

    def _search(self) -> VerifiedCheckpoint | ValueError | None:
        """Find the newest checkpoint, on the first process only.

        An error is returned, not raised, so that ``newest`` can raise it on every process. Otherwise the others would
        wait for the first process forever.
        """
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
            for key, value in self.identity.items():
                if manifest.get(key) != value:
                    return ValueError(f"{path} belongs to {key} {manifest.get(key)}, this run has {value}; delete it")
            return VerifiedCheckpoint(path, manifest)
        return None

    def load(self, checkpoint: VerifiedCheckpoint, state: State) -> None:
        """Load a checkpoint into model and optimizer.

        The states of the random generators are loaded, too, if as many processes wrote the checkpoint.
        """
        document: dict[str, Any] = {"run": state}
        same_world = checkpoint.manifest["processes"] == self.team.world
        if same_world:
            document["rng"] = {str(self.team.rank): _random_state(self.team.device)}
        reader = dcp.FileSystemReader(checkpoint.path)
        dcp.load(document, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        if same_world:
            _set_random_state(document["rng"][str(self.team.rank)], self.team.device)


class _Writer(dcp.FileSystemWriter):
    """A writer that flushes every file and calls a function on the first process at the end of a save.

    An exception of that function makes the save fail on all processes.
    """

    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder, sync_files=True)
        self._commit = commit

    def finish(self, metadata: Any, results: Any) -> None:
        """Commit the checkpoint; torch calls this on the first process after all processes have written."""
        super().finish(metadata, results)
        self._commit()


def verified(path: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest and return the manifest.

    Raises:
        ValueError: the manifest is missing, or a file does not agree with it; the message says which.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError("no manifest")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files, stored_digest = manifest["files"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("the manifest cannot be read") from None
    if stored_digest != _digest(manifest):
        raise ValueError("the manifest was changed")
    if manifest["manifest_version"] != MANIFEST_VERSION:
        raise ValueError(f"manifest_version={manifest['manifest_version']}, this release reads {MANIFEST_VERSION}")
    for name, recorded in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (path / name).stat().st_size != recorded["bytes"]:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {recorded['bytes']}")
        if _fingerprint(path / name) != recorded:
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
    """Return the states of torch's generators; training draws no numbers from Python's or numpy's generators."""
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else {**state, device.type: torch.cuda.get_rng_state(device)}


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.cuda.set_rng_state(state[device.type], device)
