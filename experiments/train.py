"""One trainer. ``python -m experiments.train byte-llama --lr 1e-3``, or under torchrun for DDP and FSDP2.

Leaves ``results/<experiment>/<hash>/{config.json, environment.json, metrics.jsonl, status.json}``. A finished run is
not run again, a failed one stays recorded as failed (and is tried again), a killed one goes on from its newest whole
checkpoint to the same bits: the data order is a pure function of the step. docs/training.md says what survives what.
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
from torch import Tensor, nn

from experiments import data
from experiments.checkpoints import Checkpoints, State
from experiments.commandline import refusals
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig
from experiments.interruption import Interruption, exit_code
from experiments.models import MLPConfig, build, lm_loss
from experiments.optimizers import make_optimizer, require_coverage, second_moment_scalars
from experiments.parallel import Device, Parallel, Team, process_group, weights_sha256
from experiments.storage import environment, locked, read_json, require_writable, write_atomic, write_json

logger = logging.getLogger("experiments")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then linear decay to zero; ``step`` counts from 0."""
    warm = max(1, round(config.warmup * config.steps))
    return config.lr * min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm))


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over fixed batches of equal size."""
    return sum(lm_loss(model, batch).item() for batch in batches) / len(batches)


def run_folder(root: Path, config: TrainConfig) -> Path:
    """Where a config's results lie."""
    return root / config.experiment / config.hash


def read_status(folder: Path) -> dict[str, Any]:
    """The content of a run's ``status.json``; empty where there is none.

    Raises:
        ValueError: the folder was written under another format version, or is damaged.
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
    """Whether the run in a folder has come to its end (a divergence is one).

    Raises:
        ValueError: as ``read_status``.
    """
    return read_status(folder).get("state") in ("finished", "diverged")


class Refused(ValueError):
    """A run that cannot start as it was asked for; the message names the value and the next action."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is run: nothing here is part of the config or its hash."""

    parallel: Parallel = "ddp"
    """What several processes do: ddp (each holds everything) or fsdp2 (each holds a slab of every tensor)."""
    keep: int = 2
    """Checkpoints kept while the run is under way."""
    device: Device = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1: how many checkpoints stay on disk")


DEFAULTS = Options()


def train(config: TrainConfig, root: Path, options: Options = DEFAULTS) -> dict[str, Any]:
    """Run a config to its end, or until SIGTERM or SIGINT, from wherever it stands.

    Every process of a group calls it alike.

    Returns:
        the content of ``status.json``; its state is ``finished``, ``diverged`` or ``interrupted``.

    Raises:
        Refused: a ValueError; a batch that does not divide over the processes, sizes that the data does not fit, or
            checkpoints of another run.
        ValueError: files of another release, or damaged ones.
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
    """One run in flight: model, optimizer, data, and the records so far."""

    def __init__(self, config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> None:
        self.config, self.folder, self.interruption = config, folder, interruption
        self.team = team = Team.here(options.parallel, options.device, config.batch)
        if team.rank == 0:
            for torn in folder.glob(".*.tmp"):
                torn.unlink()
            how = {"processes": team.world, "parallel": team.kind, "device": team.device.type}
            write_json(folder / "environment.json", {**environment(), **how})
        self._seed()
        self.model = build(config.model, config.seed).to(team.device)
        self.parallel = team.wrap(self.model)
        self.optimizer = make_optimizer(
            self.model, config.arm, lr=config.lr, betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay, seed=config.seed,
        )  # fmt: skip
        require_coverage(self.model, self.optimizer)
        self.corpus = data.load(config.data)
        if self.corpus.vocab > config.model.vocab:
            raise ValueError(
                f"model.vocab={config.model.vocab} must be at least {self.corpus.vocab}, the tokens of "
                f"data={config.data!r}; raise it, or choose other data"
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

    def go(self) -> dict[str, Any]:
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
                    if not math.isfinite(self.records[-1]["val_loss"]):  # the last step alone can spoil the weights
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
        self._write_records()
        return self._status("finished")

    def _one_step(self) -> float:
        """One optimizer step on this process's rows of the global batch; the loss is the global batch's."""
        config = self.config
        batch = self.sample(self.corpus.train, config.seed, self.step, config.batch, config.seq_len)
        loss = lm_loss(self.parallel, self.team.own(batch))
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        shown, self.stopping = self.team.agree(loss.detach(), bool(self.interruption.signal))
        return shown

    def _record(self, loss: float) -> None:
        """Every process takes part in the validation: under FSDP2 none has a whole model."""
        record = {
            "step": self.step, "tokens": self.step * self.config.batch * self.config.seq_len, "train_loss": loss,
            "val_loss": validation_loss(self.model, self.validation), "lr": learning_rate(self.config, self.step - 1),
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
        self.records.append(record)
        logger.info("step %(step)d train %(train_loss).4f val %(val_loss).4f lr %(lr).2e", record)
        try:
            self._write_records()
        except OSError as error:  # a full disk, maybe with a checkpoint in flight; the next record writes them all
            logger.error("the records up to step %d were not written, training goes on: %s", self.step, error)

    def _write_records(self) -> None:
        if self.team.rank == 0:
            lines = "".join(json.dumps(r) + "\n" for r in self.records)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def _stop(self) -> dict[str, Any]:
        number = self.interruption.signal or signal.SIGTERM  # it may have come to another process
        saved = self.checkpoints.wait()
        logger.warning(
            "%s: stopped after step %d, %s; the same command goes on", signal.Signals(number).name, self.step,
            "saved" if saved else "NOT saved: the checkpoint before it will be used",
        )  # fmt: skip
        return {**self._status("interrupted"), "signal": int(number)}

    def _resume(self) -> None:
        found = self.checkpoints.newest()
        if found is None:
            return
        self.checkpoints.load(found, State(self.model, self.optimizer))
        progress = found.manifest["progress"]
        self.step, self.seconds, self.records = found.step, progress["seconds"], progress["records"]
        if found.manifest["processes"] != self.team.world:
            self._seed()
        logger.info("resumed %s at step %d", self.folder, self.step)

    def _seed(self) -> None:
        """torch's generators from (seed, rank, step): for a start, and where other processes go on."""
        words = f"{self.config.seed} {self.team.rank} {getattr(self, 'step', 0)}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))

    def _status(self, state: str) -> dict[str, Any]:
        last = self.records[-1]["val_loss"] if self.records and state == "finished" else None
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "state": state, "format_version": FORMAT_VERSION, "steps": self.step, "final_val_loss": last,
            "parameters": parameters, "second_moment_scalars": second_moment_scalars(self.model, self.config.arm),
            "data_fingerprint": self.corpus.fingerprint[:16], "seconds": round(self.seconds, 2),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "weights_sha256": weights_sha256(self.model), "failed_checkpoints": self.checkpoints.failures,
        }  # fmt: skip


def launch(config: TrainConfig, root: Path, options: Options, threads: int = 0) -> int:
    """Train as this process's environment says: alone, or as one of those that torchrun started.

    Returns:
        the exit code.

    Raises:
        SystemExit: another process works on the run.
        ValueError: negative threads, or as ``train``.
    """
    if threads < 0:
        raise Refused(f"threads={threads} must be at least 0; 0 leaves torch's choice")
    if threads:
        torch.set_num_threads(threads)
    with process_group(options.device):
        first = not dist.is_initialized() or dist.get_rank() == 0
        with locked(run_folder(root, config.with_rules_hash())) if first else nullcontext():
            status = train(config, root, options)
    return exit_code(status["signal"]) if status["state"] == "interrupted" else 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run, and how."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS
    """How it is run."""
    results: Path = Path("results")
    """Root of the results folders."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""


def main() -> None:
    """The command line: a config's name, then overrides of its fields."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jobs = {name: ((make.__doc__ or "").strip(), Job(make())) for name, make in CONFIGS.items()}
    with refusals(ValueError, OSError):  # a value out of its range, an arm that is no rule set, a damaged folder
        job = tyro.extras.overridable_config_cli(jobs, config=(tyro.conf.AvoidSubcommands,))
        config = job.config.with_rules_hash()
        require_writable(job.results, "results")
        done = finished(run_folder(job.results, config))
    if not done:
        with refusals(ValueError, OSError, RuntimeError):  # unknown data, or data that cannot be fetched
            data.load(config.data)
    with refusals(Refused, OSError):
        code = launch(job.config, job.results, job.options, job.threads)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
