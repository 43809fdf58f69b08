"""One trainer. ``python -m experiments.train byte-llama --lr 1e-3``, or under torchrun for data parallelism.

Leaves ``results/<experiment>/<hash>/{config.json, environment.json, metrics.jsonl, status.json}``. A finished run is
not run again, a failed one stays recorded as failed (and is tried again), a killed one goes on from its checkpoint to
the same bits: the data order is a pure function of the step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import resource
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments import data
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig
from experiments.models import MLPConfig, build, lm_loss
from experiments.optimizers import make_optimizer, second_moment_scalars
from experiments.storage import environment, load_checkpoint, read_json, save_checkpoint, write_atomic, write_json

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


def finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end (a divergence is one).

    Raises:
        ValueError: the folder was written under another format version, or is damaged.
    """
    status = read_json(folder / "status.json")
    if status is None:
        return False
    if status.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version={status.get('format_version')}, this release writes {FORMAT_VERSION}; give "
            "another --results folder, or read it with the release that wrote it"
        )
    return status["state"] in ("finished", "diverged")


def train(config: TrainConfig, root: Path) -> dict[str, Any]:
    """Run a config to its end, from wherever it stands.

    Returns:
        the content of ``status.json``.
    """
    config = config.with_rules_hash()
    folder = run_folder(root, config)
    if finished(folder):
        logger.info("%s is finished: not run again", folder)
        status: dict[str, Any] = read_json(folder / "status.json")
        return status
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        write_json(folder / "config.json", config.to_dict())
        write_json(folder / "environment.json", environment())
    try:
        status = _Run(config, folder, rank).go()
    except Exception:
        if rank == 0:
            failure = {"state": "failed", "format_version": FORMAT_VERSION, "error": traceback.format_exc()}
            write_json(folder / "status.json", failure)
        raise
    if rank == 0:
        write_json(folder / "status.json", status)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return status


class _Run:
    """One run in flight: model, optimizer, data, and the records so far."""

    def __init__(self, config: TrainConfig, folder: Path, rank: int) -> None:
        self.config, self.folder, self.rank = config, folder, rank
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if config.batch % self.world:
            raise ValueError(f"batch={config.batch} does not divide over {self.world} processes; choose a multiple")
        self.model = build(config.model, config.seed)
        self.optimizer = make_optimizer(
            self.model, config.arm, lr=config.lr, betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay, seed=config.seed,
        )  # fmt: skip
        _require_coverage(self.model, self.optimizer)
        self.parallel = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.corpus = data.load(config.data)
        batches = data.fixed_batches(self.corpus.validation, config.eval_batches, config.batch, config.seq_len)
        is_mlp = isinstance(config.model, MLPConfig)
        self.validation = [(x, y[:, -1].contiguous()) for x, y in batches] if is_mlp else batches
        self.sample = data.context_batch_at if is_mlp else data.batch_at
        self.step, self.seconds = 0, 0.0
        self.records: list[dict[str, float]] = []

    def go(self) -> dict[str, Any]:
        self._resume()
        logger.info("config %s", json.dumps(self.config.to_dict(), sort_keys=True))
        started = time.perf_counter() - self.seconds
        while self.step < self.config.steps:
            loss = self._one_step()
            self.seconds = time.perf_counter() - started
            if not math.isfinite(loss):
                return self._status("diverged")
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self._record(loss)
                if not math.isfinite(self.records[-1]["val_loss"]):  # the last step alone can spoil the weights
                    return self._status("diverged")
            if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                self._checkpoint()
        return self._status("finished")

    def _one_step(self) -> float:
        """One optimizer step on this process's rows of the global batch; the loss is the global batch's."""
        config = self.config
        inputs, targets = self.sample(self.corpus.train, config.seed, self.step, config.batch, config.seq_len)
        own = slice(self.rank, None, self.world)
        loss = lm_loss(self.parallel, (inputs[own], targets[own]))
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        shown = loss.detach()
        if self.world > 1:
            dist.all_reduce(shown, dist.ReduceOp.AVG if dist.get_backend() != "gloo" else dist.ReduceOp.SUM)
            shown /= self.world if dist.get_backend() == "gloo" else 1
        return shown.item()

    def _record(self, loss: float) -> None:
        record = {
            "step": self.step, "tokens": self.step * self.config.batch * self.config.seq_len, "train_loss": loss,
            "val_loss": validation_loss(self.model, self.validation), "lr": learning_rate(self.config, self.step - 1),
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
        self.records.append(record)
        if self.rank == 0:
            lines = "".join(json.dumps(r) + "\n" for r in self.records)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())
            logger.info("step %(step)d train %(train_loss).4f val %(val_loss).4f lr %(lr).2e", record)

    def _checkpoint(self) -> None:
        if self.rank == 0:
            state = {
                "config": self.config.hash, "step": self.step, "seconds": self.seconds, "records": self.records,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            }  # fmt: skip
            save_checkpoint(self.folder / "checkpoint.pt", state)

    def _resume(self) -> None:
        state = load_checkpoint(self.folder / "checkpoint.pt")
        if state is None:
            return
        if state["config"] != self.config.hash:
            raise ValueError(f"{self.folder}/checkpoint.pt belongs to config {state['config']}; delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.records = state["step"], state["seconds"], state["records"]
        logger.info("resumed %s at step %d", self.folder, self.step)

    def _status(self, state: str) -> dict[str, Any]:
        last = self.records[-1]["val_loss"] if self.records and state == "finished" else None
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "state": state, "format_version": FORMAT_VERSION, "steps": self.step, "final_val_loss": last,
            "parameters": parameters, "second_moment_scalars": second_moment_scalars(self.model, self.config.arm),
            "data_fingerprint": self.corpus.fingerprint[:16], "seconds": round(self.seconds, 2),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }  # fmt: skip


def _require_coverage(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds exactly the model's trainable parameters, each once."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise RuntimeError(f"the optimizer holds {len(held)} parameters, the model has {len(wanted)} trainable ones")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run, and how."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    results: Path = Path("results")
    """Root of the results folders."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""


def main() -> None:
    """The command line: a config's name, then overrides of its fields."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jobs = {name: ((make.__doc__ or "").strip(), Job(make())) for name, make in CONFIGS.items()}
    job = tyro.extras.overridable_config_cli(jobs, config=(tyro.conf.AvoidSubcommands,))
    if job.threads:
        torch.set_num_threads(job.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        logging.getLogger().setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)
    try:
        train(job.config, job.results)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
