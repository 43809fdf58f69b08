"""Train one config: ``python -m experiments.train byte-llama --lr 1e-3``, under torchrun for DDP and FSDP2.

A run writes ``results/<experiment>/<hash>/{config.json, environment.json, metrics.jsonl, status.json}``. A finished run
is not repeated. A failed run is recorded as failed, and the same command starts it again. A killed run resumes from its
newest valid checkpoint and gives the same bits, because the data order is a pure function of the step.
docs/training.md lists which failures a run survives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import nn

from experiments import data, passes
from experiments.checkpoints import Checkpoints, State
from experiments.commandline import refusals
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig, of_workloads
from experiments.data.samples import SAMPLES, prepare_sample
from experiments.interruption import Interruption, exit_code
from experiments.optimizers import optimizer_of
from experiments.parallel import Device, Parallel, Team, process_group
from experiments.recipes import RECIPES
from experiments.records import Records, execution, leave, status
from experiments.storage import locked, read_json, require_writable, write_json
from experiments.tasks import LanguageModelling, Loop, Shows, Task
from experiments.trackers import TrackerName, make_tracker
from experiments.workloads import KINDS

logger = logging.getLogger("experiments")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then decay to ``lr_end`` of the peak."""
    warm = max(1, round(config.warmup * config.steps))
    left = (config.steps - step) / max(1, config.steps - warm)
    share = left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * min(left, 1.0))
    return config.lr * min((step + 1) / warm, config.lr_end + (1 - config.lr_end) * share)


def run_folder(root: Path, config: TrainConfig) -> Path:
    """Return the folder of a config's results."""
    return root / config.experiment / config.hash


def read_status(folder: Path) -> dict[str, Any]:
    """Return the content of a run's ``status.json``, or an empty dict if there is no such file.

    Raises:
        ValueError: the folder has another format version, or is damaged.
    """
    status = read_json(folder / "status.json")
    if status is None:
        return {}
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        raise ValueError(f"{folder / 'status.json'} is damaged (it names no state); delete its folder to run it again")
    if status.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version={status.get('format_version')}, this release writes {FORMAT_VERSION}; give "
            "another --results folder, or read it with the release that wrote it"
        )
    return status


def ended(status: Mapping[str, Any]) -> bool:
    """Return whether a status is that of a run with results, which finished or diverged."""
    return status.get("state") in ("finished", "diverged")


def finished(folder: Path) -> bool:
    """Return whether the run in a folder has ended, finished or diverged.

    Raises:
        ValueError: the folder has another format version, or is damaged.
    """
    return ended(read_status(folder))


class Refused(ValueError):
    """A run cannot start with these arguments; the message names the value and the next action."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a run that are not part of its config or its hash."""

    parallel: Parallel = "ddp"
    """Parallelism of several processes: ddp (each has the whole model) or fsdp2 (each has a shard of every tensor)."""
    keep: int = 2
    """Number of checkpoints that stay on disk during the run."""
    device: Device = "cpu"
    """Device to train on."""
    micro_batch: int = 0
    """Sequences of a forward and backward pass on one device; gradients are accumulated over them. 0 for all."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    recompute: bool = False
    """Keep only the inputs of layers, and compute their activations again in the backward pass."""
    track: TrackerName = "none"
    """Where records also go, beside metrics.jsonl: none, tensorboard (events in the run's folder), wandb or trackio."""

    def __post_init__(self) -> None:
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch={self.micro_batch} must be at least 0; 0 takes all sequences at once")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1: how many checkpoints stay on disk")


DEFAULTS = Options()


def train(config: TrainConfig, root: Path, options: Options = DEFAULTS) -> dict[str, Any]:
    """Train a config to its end or until SIGTERM or SIGINT, starting from its newest checkpoint if there is one.

    Every process of a group calls this function with the same arguments.

    Returns:
        The content of ``status.json``; its state is ``finished``, ``diverged`` or ``interrupted``.

    Raises:
        Refused: the batch does not divide over the processes, the data does not fit the model's sizes, or the
            checkpoints belong to another run. Refused is a ValueError.
        ValueError: a file has another format version, or is damaged.
    """
    config = config.with_rules_hash()
    folder = run_folder(root, config)
    if finished(folder):
        logger.info("%s is finished: not run again", folder)
        return read_status(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        write_json(folder / "config.json", config.to_dict())
    try:
        with Interruption() as interruption, torch.random.fork_rng(devices=[]):
            try:
                run = _loop(config)(config, folder, options, interruption)
            except ValueError as error:
                raise Refused(str(error)) from error
            ending = run.go()
    except Exception:
        if rank == 0:
            failure = {"state": "failed", "format_version": FORMAT_VERSION, "error": traceback.format_exc()}
            write_json(folder / "status.json", failure)
        raise
    if rank == 0:
        write_json(folder / "status.json", ending)
        if ending["state"] != "interrupted" and not ending.get("reason"):
            run.clear()
    return ending


def make_task(config: TrainConfig, device: torch.device) -> Task:
    """Return what a config trains and how it is judged.

    Raises:
        ValueError: the data does not fit the model.
    """
    if isinstance(config.model, KINDS):
        return config.model.task(config, device)
    return LanguageModelling(config, device)


def fetch(config: TrainConfig) -> None:
    """Check that a run's libraries and data are there, and download what is not.

    Raises:
        ValueError: the data is unknown.
        OSError: a package or file is missing.
        RuntimeError: a library is missing, or something cannot be downloaded.
    """
    if isinstance(config.model, KINDS):
        config.model.fetch(config)
    elif config.data in SAMPLES:
        prepare_sample(config.data)
    else:
        data.load(config.data)


def _loop(config: TrainConfig) -> Callable[[TrainConfig, Path, Options, Interruption], Loop]:
    """Return what makes the loop of a run: this module's, or that of a library that trains by itself."""
    return getattr(type(config.model), "loop", None) or _Run


class _Run:
    """The state of one run: task, optimizer, and the records so far."""

    def __init__(self, config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> None:
        self.config, self.folder, self.interruption = config, folder, interruption
        self.options = options
        self.team = team = Team.here(options.parallel, options.device, config.batch)
        if team.rank == 0:
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink()
        self._seed()
        self.task = make_task(config, team.device)
        self.model = team.place(self.task.model)
        self.casting = passes.cast(team.device, config.precision, team.kind)
        self.parallel = self._prepared()
        self.optimizer = optimizer_of(self.model, config)
        identity = {"config": config.hash, "data": self.task.fingerprint[:16]}
        self.checkpoints = Checkpoints(folder / "checkpoints", identity, team, options.keep)
        self.step, self.seconds, self.stopping = 0, 0.0, False
        earlier = self._resume()
        self.tracker = make_tracker("none" if team.rank else options.track, folder, config.to_dict(), self.step)
        self.records = Records(folder, self.tracker, writes=team.rank == 0, earlier=earlier)

    def _prepared(self) -> nn.Module:
        """Apply the options to the model, wrap it, and record how the run is executed; return the module to call."""
        team, options = self.team, self.options
        if options.recompute:
            if not hasattr(self.model, "recompute"):
                raise ValueError(f"recompute=True: a {type(self.model).__name__} has no layers; use recompute=False")
            self.model.recompute = True
        if options.compile:
            passes.compile_blocks(self.model)
        module = team.wrap(self.model, self.config.precision)
        if team.rank == 0:
            write_json(self.folder / "environment.json", execution(team, options, self.model))
        return module

    def go(self) -> dict[str, Any]:
        """Train to the end, a divergence or a signal, and return the status."""
        config = self.config
        logger.info("config %s", json.dumps(config.to_dict(), sort_keys=True))
        started = time.perf_counter() - self.seconds
        try:
            while self.step < config.steps:
                loss = self._one_step()
                self.seconds = time.perf_counter() - started
                if not math.isfinite(loss):
                    return self._diverged()
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self._record(loss)
                    if not math.isfinite(self.records.all[-1]["val_loss"]):  # The last update can make the weights NaN.
                        return self._diverged()
                if self.step == config.steps:
                    break
                if self.stopping or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    progress = {"seconds": self.seconds, "records": self.records.all}
                    self.checkpoints.save(State(self.model, self.optimizer), self.step, progress)
                if self.stopping:
                    return self._stop()
                self.checkpoints.poll()
        finally:
            self.checkpoints.wait()
            self.tracker.close()
        self.records.write()
        ending = self._status("finished")  # Before artefacts are made, whose memory is not the run's.
        if isinstance(self.task, Shows):
            artefacts = self.task.artefacts(casting=self.casting)
            if self.team.rank == 0:
                leave(self.folder, artefacts)
        return ending

    def _one_step(self) -> float:
        """Take one optimizer step on this process's rows of the global batch; return the global batch's loss."""
        config = self.config
        rows = self.team.local_rows(self.task.batch(self.step))
        loss = passes.backward(
            self.parallel, rows, rows=self.options.micro_batch, casting=self.casting, loss_of=self.task.loss
        )
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        global_loss, self.stopping = self.team.agree(loss, bool(self.interruption.signal))
        return global_loss

    def _record(self, loss: float) -> None:
        """Compute the numbers on held-out data and store a record.

        Every process has to call this method, because under FSDP2 no process has the whole model.
        """
        record = {
            "step": self.step,
            "tokens": self.step * self.config.batch * self.config.seq_len,
            "train_loss": loss,
            **self.task.evaluate(rows=self.options.micro_batch, casting=self.casting),
            "lr": learning_rate(self.config, self.step - 1),
            "seconds": round(self.seconds, 3),
        }
        self.records.add(record)

    def _stop(self) -> dict[str, Any]:
        number = self.interruption.signal or signal.SIGTERM  # 0 here means that another process received the signal.
        saved = self.checkpoints.wait()
        logger.warning(
            "%s: stopped after step %d, %s; the same command resumes the run",
            signal.Signals(number).name,
            self.step,
            "saved" if saved else "NOT saved: the checkpoint before it will be used",
        )
        return {**self._status("interrupted"), "signal": int(number)}

    def _resume(self) -> list[dict[str, float]]:
        """Load the newest checkpoint if there is one, and return the records before it."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return []
        self.checkpoints.load(checkpoint, State(self.model, self.optimizer))
        progress = checkpoint.manifest["progress"]
        self.step, self.seconds = checkpoint.step, progress["seconds"]
        if checkpoint.manifest["processes"] != self.team.world:
            self._seed()
        logger.info("resumed %s at step %d", self.folder, self.step)
        return list(progress["records"])

    def _seed(self) -> None:
        """Seed torch's generators from (seed, rank, step), at the start and if the number of processes changed."""
        words = f"{self.config.seed} {self.team.rank} {getattr(self, 'step', 0)}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))

    def _status(self, how: str) -> dict[str, Any]:
        return status(
            how,
            self.config,
            self.model,
            self.optimizer,
            self.records,
            step=self.step,
            seconds=self.seconds,
            fingerprint=self.task.fingerprint,
            failed_checkpoints=self.checkpoints.failures,
        )

    def _diverged(self) -> dict[str, Any]:
        """Return the status of a run that has diverged, with the task's reason if it has one."""
        reason = getattr(self.task, "stopped", "")
        return {**self._status("diverged"), **({"reason": reason} if reason else {})}

    def clear(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        self.checkpoints.clear()


def launch(config: TrainConfig, root: Path, options: Options, threads: int = 0) -> int:
    """Train a config in this process, alone or as one of the processes that torchrun started.

    Args:
        config: the run.
        root: results root.
        options: options of the run that are not part of its config.
        threads: number of torch threads; 0 keeps torch's default.

    Returns:
        The exit code.

    Raises:
        SystemExit: another process works on the run.
        ValueError: threads is negative, the run cannot start with its arguments, or a file is damaged.
    """
    if threads < 0:
        raise Refused(f"threads={threads} must be at least 0; 0 keeps torch's default")
    if threads:
        torch.set_num_threads(threads)
    with process_group(options.device):
        first = not dist.is_initialized() or dist.get_rank() == 0
        with locked(run_folder(root, config.with_rules_hash())) if first else nullcontext():
            ending = train(config, root, options)
    return exit_code(ending["signal"]) if ending["state"] == "interrupted" else 0


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of the command line."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run's config."""
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS
    """Options of the run that are not part of its config."""
    results: Path = Path("results")
    """Root of the results folders."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""


def main() -> None:
    """Run the command line: a config's name, followed by overrides of its fields."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    named = CONFIGS | RECIPES
    jobs = {name: ((make.__doc__ or "").strip(), Job(make())) for name, make in named.items()}
    jobs |= {name: (f"Workload {name} (docs/workloads.md).", Job(config)) for name, config in of_workloads().items()}
    with refusals(ValueError, OSError):  # A value is out of range, an arm is no rule set, or a folder is damaged.
        job = tyro.extras.overridable_config_cli(jobs, config=(tyro.conf.AvoidSubcommands,))
        config = job.config.with_rules_hash()
        require_writable(job.results, "results")
        done = finished(run_folder(job.results, config))
    if not done:
        with refusals(ValueError, OSError, RuntimeError):  # The data is unknown or cannot be downloaded.
            fetch(config)
    with refusals(Refused, OSError):
        code = launch(job.config, job.results, job.options, job.threads)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
