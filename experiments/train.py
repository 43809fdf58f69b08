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
import resource
import signal
import time
import traceback
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
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig
from experiments.interruption import Interruption, exit_code
from experiments.models import MLPConfig, build
from experiments.optimizers import make_optimizer, require_coverage, second_moment_scalars
from experiments.parallel import Device, Parallel, Team, peak_on_device, process_group, weights_sha256
from experiments.recipes import RECIPES
from experiments.rivals import state_size
from experiments.storage import environment, locked, read_json, require_writable, write_atomic, write_json
from experiments.trackers import TrackerName, make_tracker

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


def finished(folder: Path) -> bool:
    """Return whether the run in a folder has ended, finished or diverged.

    Raises:
        ValueError: the folder has another format version, or is damaged.
    """
    return read_status(folder).get("state") in ("finished", "diverged")


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
                run = _Run(config, folder, options, interruption)
            except ValueError as error:
                raise Refused(str(error)) from error
            status = run.go()
    except Exception:
        if rank == 0:
            failure = {"state": "failed", "format_version": FORMAT_VERSION, "error": traceback.format_exc()}
            write_json(folder / "status.json", failure)
        raise
    if rank == 0:
        write_json(folder / "status.json", status)
        if status["state"] != "interrupted":
            run.checkpoints.clear()
    return status


class _Run:
    """The state of one run: model, optimizer, data, and the records so far."""

    def __init__(self, config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> None:
        self.config, self.folder, self.interruption = config, folder, interruption
        self.options = options
        self.team = team = Team.here(options.parallel, options.device, config.batch)
        if team.rank == 0:
            for unfinished in folder.glob(".*.tmp"):
                unfinished.unlink()
        self._seed()
        self.model = team.place(build(config.model, config.seed))
        self.casting = passes.cast(team.device, config.precision, team.kind)
        self.parallel = self._prepared()
        self.optimizer = make_optimizer(
            self.model,
            config.arm,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            eps=config.eps,
            seed=config.seed,
        )
        require_coverage(self.model, self.optimizer)
        self.corpus = data.load(config.data)
        if self.corpus.vocab > config.model.vocab:
            raise ValueError(
                f"model.vocab={config.model.vocab} must be at least {self.corpus.vocab}, the tokens of "
                f"data={config.data!r}; increase it, or choose other data"
            )
        batches = data.fixed_batches(self.corpus.validation, config.eval_batches, config.batch, config.seq_len)
        is_mlp = isinstance(config.model, MLPConfig)
        batches = [(x, y[:, -1].contiguous()) for x, y in batches] if is_mlp else batches
        self.validation = [(x.to(team.device), y.to(team.device)) for x, y in batches]
        self.sample = data.context_batch_at if is_mlp else data.batch_at
        identity = {"config": config.hash, "data": self.corpus.fingerprint[:16]}
        self.checkpoints = Checkpoints(folder / "checkpoints", identity, team, options.keep)
        self.step, self.seconds, self.stopping = 0, 0.0, False
        self.records: list[dict[str, float]] = []
        self._resume()
        self.tracker = make_tracker("none" if team.rank else options.track, folder, config.to_dict(), self.step)

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
            how = {"processes": team.world, "parallel": team.kind, "device": team.device.type}
            how |= {name: getattr(options, name) for name in ("micro_batch", "compile", "recompute")}
            how["parameters_on"] = str(next(self.model.parameters()).device)
            write_json(self.folder / "environment.json", {**environment(), **how})
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
                    return self._status("diverged")
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self._record(loss)
                    if not math.isfinite(self.records[-1]["val_loss"]):  # The last update can make the weights NaN.
                        return self._status("diverged")
                if self.step == config.steps:
                    break
                if self.stopping or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    progress = {"seconds": self.seconds, "records": self.records}
                    self.checkpoints.save(State(self.model, self.optimizer), self.step, progress)
                if self.stopping:
                    return self._stop()
                self.checkpoints.poll()
        finally:
            self.checkpoints.wait()
            self.tracker.close()
        self._write_records()
        return self._status("finished")

    def _one_step(self) -> float:
        """Take one optimizer step on this process's rows of the global batch; return the global batch's loss."""
        config = self.config
        batch = self.sample(self.corpus.train, config.seed, self.step, config.batch, config.seq_len)
        rows = self.team.local_rows(batch)
        loss = passes.backward(self.parallel, rows, rows=self.options.micro_batch, casting=self.casting)
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
        """Compute the validation loss and store a record.

        Every process has to call this method, because under FSDP2 no process has the whole model.
        """
        record = {
            "step": self.step,
            "tokens": self.step * self.config.batch * self.config.seq_len,
            "train_loss": loss,
            "val_loss": passes.validation_loss(
                self.model, self.validation, rows=self.options.micro_batch, casting=self.casting
            ),
            "lr": learning_rate(self.config, self.step - 1),
            "seconds": round(self.seconds, 3),
        }
        self.records.append(record)
        self.tracker.record(record)
        logger.info("step %(step)d train %(train_loss).4f val %(val_loss).4f lr %(lr).2e", record)
        try:
            self._write_records()
        except OSError as error:  # The disk may be full for a moment. The next record writes all records again.
            logger.error("the records up to step %d were not written, training goes on: %s", self.step, error)

    def _write_records(self) -> None:
        if self.team.rank == 0:
            lines = "".join(json.dumps(r) + "\n" for r in self.records)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())

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

    def _resume(self) -> None:
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return
        self.checkpoints.load(checkpoint, State(self.model, self.optimizer))
        progress = checkpoint.manifest["progress"]
        self.step, self.seconds, self.records = checkpoint.step, progress["seconds"], progress["records"]
        if checkpoint.manifest["processes"] != self.team.world:
            self._seed()
        logger.info("resumed %s at step %d", self.folder, self.step)

    def _seed(self) -> None:
        """Seed torch's generators from (seed, rank, step), at the start and if the number of processes changed."""
        words = f"{self.config.seed} {self.team.rank} {getattr(self, 'step', 0)}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))

    def _status(self, how: str) -> dict[str, Any]:
        last = self.records[-1]["val_loss"] if self.records and how == "finished" else None
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        state = state_size(self.optimizer)
        return {
            "state": how,
            "format_version": FORMAT_VERSION,
            "steps": self.step,
            "final_val_loss": last,
            "parameters": parameters,
            "second_moment_scalars": second_moment_scalars(self.model, self.config.arm, self.optimizer),
            "state_values": state.values,
            "state_bytes": state.bytes,
            "first_moment_values": state.first,
            "data_fingerprint": self.corpus.fingerprint[:16],
            "seconds": round(self.seconds, 2),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **peak_on_device(self.team.device),
            "weights_sha256": weights_sha256(self.model),
            "failed_checkpoints": self.checkpoints.failures,
        }


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
            status = train(config, root, options)
    return exit_code(status["signal"]) if status["state"] == "interrupted" else 0


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
    with refusals(ValueError, OSError):  # A value is out of range, an arm is no rule set, or a folder is damaged.
        job = tyro.extras.overridable_config_cli(jobs, config=(tyro.conf.AvoidSubcommands,))
        config = job.config.with_rules_hash()
        require_writable(job.results, "results")
        done = finished(run_folder(job.results, config))
    if not done:
        with refusals(ValueError, OSError, RuntimeError):  # The data is unknown or cannot be downloaded.
            data.load(config.data)
    with refusals(Refused, OSError):
        code = launch(job.config, job.results, job.options, job.threads)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
