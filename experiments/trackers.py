"""Send a run's records to TensorBoard, Weights & Biases or trackio, beside ``metrics.jsonl``.

A tracker is an option of a run: it changes neither its config nor its results. To add one, write a class with
``record`` and ``close``, and one line in ``TRACKERS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

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


class TensorBoard:
    """Event files in the folder ``events`` of the run, which ``tensorboard --logdir results`` shows.

    Args:
        folder: the run's folder.
        config: the run's config.
        step: the step from which the run goes on; events after it, of a process that was killed, are hidden.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        library = _library("tensorboardX", "tensorboard")
        self.writer = library.SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def record(self, values: Mapping[str, float]) -> None:
        """Write one point of every number, and flush, so that a killed run keeps it."""
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
    """Start a tracker.

    Args:
        name: key of ``TRACKERS``.
        folder: the run's folder.
        config: the run's config as a JSON-able dict.
        step: the step from which the run goes on.

    Raises:
        ValueError: the tracker's library is not installed.
    """
    return TRACKERS[name](folder, config, step)


def _library(module: str, tracker: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"track={tracker!r} needs {module} ({error}); pip install {module}, or use track='none': metrics.jsonl is "
            "written in any case"
        ) from error
