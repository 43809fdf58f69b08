"""What a run leaves while it trains and when it ends: its records, and the content of ``status.json``."""

from __future__ import annotations

import json
import logging
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.configs import FORMAT_VERSION, TrainConfig
from experiments.optimizers import second_moment_scalars
from experiments.parallel import Team, peak_on_device, weights_sha256
from experiments.rivals import state_size
from experiments.storage import environment, write_atomic, write_json
from experiments.trackers import Tracker

if TYPE_CHECKING:
    from experiments.train import Options

logger = logging.getLogger("experiments")


class Records:
    """The records of a run: held-out numbers at some steps, in ``metrics.jsonl`` and in a tracker.

    Args:
        folder: the run's folder.
        tracker: where records also go.
        writes: whether this process writes the file; only the first process of a run does.
        earlier: the records before a resumed run's checkpoint.

    Attributes:
        all: the records so far, oldest first.
    """

    def __init__(
        self, folder: Path, tracker: Tracker, *, writes: bool = True, earlier: list[dict[str, float]] | None = None
    ) -> None:
        self.folder, self.tracker, self.writes = folder, tracker, writes
        self.all: list[dict[str, float]] = earlier or []

    def add(self, record: Mapping[str, float]) -> None:
        """Store one record, and write all of them. If that fails, it is logged, and the next one tries again.

        Args:
            record: ``step``, ``train_loss``, ``val_loss``, ``lr`` and further numbers.
        """
        self.all.append(dict(record))
        self.tracker.record(record)
        logger.info("step %(step)d train %(train_loss).4f val %(val_loss).4f lr %(lr).2e", record)
        try:
            self.write()
        except OSError as error:  # The disk may be full for a moment. The next record writes all records again.
            logger.error("the records up to step %d were not written, training goes on: %s", record["step"], error)

    def write(self) -> None:
        """Write all records.

        Raises:
            OSError: the file cannot be written.
        """
        if self.writes:
            lines = "".join(json.dumps(record) + "\n" for record in self.all)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())


def execution(team: Team, options: Options, model: nn.Module) -> dict[str, Any]:
    """Return the content of ``environment.json``: versions, machine, processes and options."""
    how = {"processes": team.world, "parallel": team.kind, "device": team.device.type}
    how |= {name: getattr(options, name) for name in ("micro_batch", "compile", "recompute")}
    return {**environment(), **how, "parameters_on": str(next(model.parameters()).device)}


OWN_FILES = ("config", "environment", "metrics", "status")
"""Names, without endings, of the files that every run has."""


def leave(folder: Path, artefacts: Mapping[str, Any]) -> None:
    """Write what a task leaves at the end of a run, one file each (``experiments.tasks.Shows``).

    Args:
        folder: the run's folder.
        artefacts: file name without ending -> JSON document.

    Raises:
        ValueError: a name is not one word of lower-case letters and underscores, or every run has a file of that name.
    """
    for name in artefacts:
        if not re.fullmatch("[a-z_]+", name) or name in OWN_FILES:
            raise ValueError(f"the artefact {name!r} needs another name: lower-case letters, and none of {OWN_FILES}")
    for name, document in artefacts.items():
        write_json(folder / f"{name}.json", document)


def status(
    how: str,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: Records,
    *,
    step: int,
    seconds: float,
    fingerprint: str,
    failed_checkpoints: int = 0,
) -> dict[str, Any]:
    """Return the content of ``status.json``. Every process of a run calls this, because it gathers sharded weights.

    Args:
        how: ``finished``, ``diverged`` or ``interrupted``.
        config: the run.
        model: the trained model.
        optimizer: its optimizer.
        records: the records so far.
        step: number of optimizer steps so far.
        seconds: how long they took.
        fingerprint: hash of the data.
        failed_checkpoints: number of checkpoints that could not be written.
    """
    device = next(model.parameters()).device
    state = state_size(optimizer)
    return {
        "state": how,
        "format_version": FORMAT_VERSION,
        "steps": step,
        "final_val_loss": records.all[-1]["val_loss"] if records.all and how == "finished" else None,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "second_moment_scalars": second_moment_scalars(model, config.arm, optimizer),
        "state_values": state.values,
        "state_bytes": state.bytes,
        "first_moment_values": state.first,
        "data_fingerprint": fingerprint[:16],
        "seconds": round(seconds, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **peak_on_device(device),
        "weights_sha256": weights_sha256(model),
        "failed_checkpoints": failed_checkpoints,
    }
