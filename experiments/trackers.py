"""Send a run's records to TensorBoard, Weights & Biases or trackio, beside ``metrics.jsonl``.

A tracker is an option of a run: it changes neither its config nor its results, and what fails in it after the start
(a full disk, a lost connection) is logged and ends the tracking, not the run. To add one, write a class with ``record``
and ``close``, and one line in ``TRACKERS``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

logger = logging.getLogger("experiments")
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
PROJECT = "adam-mini-lab"


class Tracker(Protocol):
    """Where records go."""

    def record(self, values: Mapping[str, float]) -> None:
        """Send one record: ``step`` and the numbers that belong to it."""

    def close(self) -> None:
        """Write what is left, and end the run."""


class Nothing:
    """No tracker."""

    def record(self, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Guarded:
    """A tracker whose errors are logged. After an error in ``record`` no more records go to it.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._failed = False

    def record(self, values: Mapping[str, float]) -> None:
        """Send one record, unless an earlier one failed."""
        if not self._failed:
            try:
                self.tracker.record(values)
            except Exception as error:
                self._failed = True
                logger.error("tracking ended at step %d, training goes on: %r", int(values["step"]), error)

    def close(self) -> None:
        """End the run's tracking."""
        try:
            self.tracker.close()
        except Exception as error:
            logger.error("the tracker was not closed, its last records may be missing: %r", error)


class TensorBoard:
    """Event files in the folder ``events`` of the run, which ``tensorboard --logdir results`` shows.

    Args:
        folder: the run's folder.
        config: the run's config.
        step: the step from which the run goes on; events after it, of a process that was killed, are hidden.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        library = _library("tensorboardX", "tensorboard")
        # A full disk ends the library's thread; then a queue with a limit would make every later record wait for ever.
        # A file's name has a time in seconds; without the step, a run resumed within a second overwrites its file.
        self.writer = library.SummaryWriter(
            str(folder / "events"), purge_step=step + 1, max_queue=0, filename_suffix=f".{step}"
        )

    def record(self, values: Mapping[str, float]) -> None:
        """Write one point of every number, and flush; a run that is killed at once may lose its last points."""
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(values["step"]))
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class Hosted:
    """A run of a library with the interface of Weights & Biases, named by the folder, so that it resumes.

    Args:
        library: name of the module.
        folder: the run's folder; its name is the hash of the config.
        config: the run's config.
        resume: how the library is told to go on with a run of that name.
        more: further arguments of the library's ``init``.
    """

    def __init__(
        self, library: str, folder: Path, config: Mapping[str, Any], resume: Mapping[str, Any], **more: Any
    ) -> None:
        module = _library(library, library)
        self.run = module.init(
            project=PROJECT,
            group=folder.parent.name,
            name=f"{config['arm']} {config['lr']:g} {config['seed']} {folder.name}",
            config=dict(config),
            **resume,
            **more,
        )

    def record(self, values: Mapping[str, float]) -> None:
        """Send one record."""
        self.run.log({name: value for name, value in values.items() if name != "step"}, step=int(values["step"]))

    def close(self) -> None:
        """End the run."""
        self.run.finish()


def _wandb(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    return Hosted("wandb", folder, config, {"id": folder.name, "resume": "allow"}, dir=str(folder))


def _trackio(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    return Hosted("trackio", folder, config, {"resume": "allow"})


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "none": lambda folder, config, step: Nothing(),
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def make_tracker(name: TrackerName, folder: Path, config: Mapping[str, Any], step: int = 0) -> Tracker:
    """Start a tracker, whose errors from then on are logged and not raised.

    Args:
        name: key of ``TRACKERS``.
        folder: the run's folder.
        config: the run's config as a JSON-able dict.
        step: the step from which the run goes on.

    Raises:
        ValueError: the tracker's library is not installed.
    """
    return Guarded(TRACKERS[name](folder, config, step))


def _library(module: str, tracker: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"track={tracker!r} needs {module} ({error}); pip install {module}, or use track='none': metrics.jsonl is "
            "written in any case"
        ) from error
