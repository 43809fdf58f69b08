"""A run in a trainer of TRL, with the optimizer, the learning rates and the records of any other run.

TRL's trainers are transformers' Trainer, which has a loop of its own. Here it gets the arm's optimizer, rows in the
order of (seed, step), and a callback that records held-out numbers, stops at a divergence or a signal, and saves.

transformers writes a checkpoint's files one after another, so a kill can leave some of them. Once all are written, the
callback adds a manifest with their sizes. A checkpoint without a manifest, or that does not agree with it, is not used.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import re
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from experiments import passes
from experiments.data import epoch_rows
from experiments.optimizers import optimizer_of
from experiments.parallel import Team
from experiments.records import Records, execution, leave, status
from experiments.storage import read_json, write_json
from experiments.tasks import Casting, Shows
from experiments.trackers import make_tracker
from experiments.train import learning_rate

from .libraries import library

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.interruption import Interruption
    from experiments.train import Options

logger = logging.getLogger("experiments")
MANIFEST = "run.json"
LIBRARIES = ("transformers", "trl", "peft", "accelerate")


class Lesson(Protocol):
    """What a trainer trains and how it is judged. It may have the method of ``experiments.tasks.Shows`` too.

    A lesson that finds out that training has gone too far to mean anything says why in an attribute ``stopped``. The
    run has then diverged after the step.

    Attributes:
        model: the model, whose first weights are a function of the seed alone.
        fingerprint: hash of the data, sixteen hexadecimal digits or more.
        examples: number of training examples.
    """

    model: nn.Module
    fingerprint: str
    examples: int

    def trainer(self, rows: list[int], arguments: dict[str, Any], **options: Any) -> Any:
        """Return the trainer.

        Args:
            rows: the training examples in the order in which the steps take them.
            arguments: arguments of the trainer's config.
            options: ``optimizers`` and ``callbacks`` of the trainer.
        """

    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the numbers on held-out data, ``val_loss`` first."""


class TrainerLoop:
    """One run in a trainer, from its newest complete checkpoint to its end.

    Args:
        config: the run.
        folder: its folder.
        options: options that are not part of the config: ``parallel='ddp'``, ``compile=False``.
        interruption: says whether a signal was received.
        lesson: what is trained.

    Raises:
        ValueError: an option is not for trainers, the batch does not divide, there are too few examples, or a
            checkpoint belongs to another run.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, options: Options, interruption: Interruption, lesson: Lesson
    ) -> None:
        require_options(options)
        self.config, self.folder, self.interruption, self.lesson = config, folder, interruption, lesson
        self.options = options
        self.team = team = Team.here(options.parallel, options.device, config.batch)
        self.model = team.place(lesson.model)
        self.optimizer = optimizer_of(self.model, config)
        steps = range(config.steps)
        self.rows = [int(i) for s in steps for i in epoch_rows(lesson.examples, config.seed, s, config.batch)[0]]
        self.casting = passes.cast(team.device, config.precision, team.kind)
        self.checkpoints = folder / "checkpoints"
        self.identity = {"config": config.hash, "data": lesson.fingerprint[:16]}
        self.checkpoint, progress = newest(self.checkpoints, self.identity)
        self.step, self.seconds = progress.get("step", 0), progress.get("seconds", 0.0)
        self.how = "finished"
        tracker = make_tracker("none" if team.rank else options.track, folder, config.to_dict(), self.step)
        self.records = Records(folder, tracker, writes=team.rank == 0, earlier=progress.get("records"))
        if team.rank == 0:
            versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
            write_json(folder / "environment.json", {**execution(team, options, self.model), **versions})

    def go(self) -> dict[str, Any]:
        """Train to the end, a divergence or a signal, and return the status."""
        started = time.perf_counter() - self.seconds
        trainer = self._trainer(started)
        if self.checkpoint:
            logger.info("resumed %s at step %d", self.folder, self.step)
        try:
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        finally:
            self.records.tracker.close()
        self.records.write()
        ending = status(
            self.how,
            self.config,
            self.model,
            self.optimizer,
            self.records,
            step=self.step,
            seconds=self.seconds,
            fingerprint=self.lesson.fingerprint,
        )
        if self.how == "diverged" and getattr(self.lesson, "stopped", ""):
            return {**ending, "reason": getattr(self.lesson, "stopped", "")}
        if self.how == "interrupted":
            return {**ending, "signal": int(self.interruption.signal or signal.SIGTERM)}
        if self.how == "finished" and isinstance(self.lesson, Shows):
            artefacts = self.lesson.artefacts(casting=self.casting)
            if self.team.rank == 0:
                leave(self.folder, artefacts)
        return ending

    def _trainer(self, started: float) -> Any:
        """Return the trainer with the arm's optimizer and the run's callback."""
        transformers = library("transformers", "a trainer")
        config, at_peak_one = self.config, replace(self.config, lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(learning_rate, at_peak_one))
        trainer = self.lesson.trainer(
            self.rows,
            arguments(config, self.options, self.team, self.checkpoints),
            optimizers=(self.optimizer, schedule),
            callbacks=[_callback(transformers.TrainerCallback)(self, started)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def after_step(self, step: int, loss: float, seconds: float) -> tuple[bool, bool]:
        """Record a step.

        Args:
            step: number of steps so far.
            loss: training loss of the last one.
            seconds: time so far.

        Returns:
            (whether to save, whether to stop)
        """
        config = self.config
        self.step, self.seconds = step, seconds
        mine = math.nan if getattr(self.lesson, "stopped", "") else loss
        loss, _ = self.team.agree(torch.tensor(mine), False)  # one process that has gone too far stops all
        if not math.isfinite(loss):
            self.how = "diverged"
            return False, True
        if step % config.eval_every == 0 or step == config.steps:
            numbers = self.lesson.evaluate(rows=self.options.micro_batch, casting=self.casting)
            self.records.add(
                {
                    "step": step,
                    "tokens": step * config.batch * config.seq_len,
                    "train_loss": loss,
                    **numbers,
                    "lr": learning_rate(config, step - 1),
                    "seconds": round(seconds, 3),
                }
            )
            if not math.isfinite(numbers["val_loss"]):  # The last update can make the weights NaN.
                self.how = "diverged"
                return False, True
        if step == config.steps:
            return False, True
        _, stopping = self.team.agree(torch.tensor(loss), bool(self.interruption.signal))
        if stopping:
            self.how = "interrupted"
        return stopping or bool(config.checkpoint_every and step % config.checkpoint_every == 0), stopping

    def saved(self) -> None:
        """Complete the checkpoint that the trainer has written, and remove old ones."""
        if self.team.rank:
            return
        folder = self.checkpoints / f"checkpoint-{self.step}"
        progress = {"step": self.step, "seconds": self.seconds, "records": self.records.all}
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / MANIFEST, {**self.identity, "files": files, "progress": progress})
        for old in _written(self.checkpoints)[: -self.options.keep]:
            shutil.rmtree(old)

    def clear(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        if self.team.rank == 0:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def require_options(options: Options) -> None:
    """Check that options of a run are for trainers of TRL.

    Raises:
        ValueError: one of them is not.
    """
    if options.parallel != "ddp":
        raise ValueError(f"parallel={options.parallel!r} is not for this workload's trainer; use parallel='ddp'")
    if options.compile:
        raise ValueError("compile=True is not for this workload's trainer; use compile=False")


def arguments(config: TrainConfig, options: Options, team: Team, folder: Path) -> dict[str, Any]:
    """Return the arguments of a trainer's config that are those of the run.

    Raises:
        ValueError: micro_batch does not divide a process's rows.
    """
    own = config.batch // team.world
    micro = options.micro_batch or own
    if own % micro:
        raise ValueError(f"micro_batch={micro} must divide {own}, the rows of one process")
    return {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": own // micro,
        "train_sampling_strategy": "sequential",  # the rows are in order
        "learning_rate": config.lr,
        "max_grad_norm": config.clip,
        "bf16": config.precision == "bf16",
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": options.recompute,
        "seed": config.seed % 2**32,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",  # the callback asks for checkpoints
        "report_to": "none",
        "disable_tqdm": True,
    }


def newest(folder: Path, identity: Mapping[str, str]) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest complete checkpoint and its progress, or (None, {}) if there is none.

    Args:
        folder: folder of the checkpoints.
        identity: entries that its manifest must have.

    Raises:
        ValueError: the checkpoint belongs to another run.
    """
    for path in reversed(_written(folder)):
        try:
            manifest = read_json(path / MANIFEST)
        except ValueError:
            manifest = None
        if not manifest or any(
            not (path / name).is_file() or (path / name).stat().st_size != size
            for name, size in manifest["files"].items()
        ):
            logger.warning("checkpoint %s was not written to its end: the one before it is used", path)
            continue
        for key, value in identity.items():
            if manifest.get(key) != value:
                raise ValueError(f"{path} belongs to {key} {manifest.get(key)}, this run has {value}; delete it")
        return path, manifest["progress"]
    return None, {}


def _written(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, complete or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _callback(base: type) -> type:
    """Return the class of the run's callback; ``base`` is transformers' class, whose library is imported late."""

    class Recorder(base):  # type: ignore[misc]
        """Tell the run what the trainer does, and the trainer when to save and to stop."""

        def __init__(self, loop: TrainerLoop, started: float) -> None:
            self.loop, self.started = loop, started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            """Record a step. The trainer's last entry, of the whole training, has no ``loss``."""
            if "loss" in logs:
                seconds = time.perf_counter() - self.started
                control.should_save, stop = self.loop.after_step(state.global_step, logs["loss"], seconds)
                control.should_training_stop = control.should_training_stop or stop

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Complete a checkpoint, whose other files are all written."""
            self.loop.saved()

    return Recorder
