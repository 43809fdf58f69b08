"""Compare how well partitions train: ``make ablation PROFILE=cpu``. The protocol is in docs/protocol.md."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import gpu_plan
from experiments.commandline import refusals
from experiments.configs import TrainConfig
from experiments.grids import STUDIES, Study, grid, names
from experiments.growing import equal_run, so_far, take_over
from experiments.runner import SINGLE, Launch, Outcome, run_many, seconds_per_run, unfinished
from experiments.slurm import Slurm, submit
from experiments.storage import require_writable
from experiments.train import DEFAULTS, Options, run_folder


def selected(configs: list[TrainConfig], only: str) -> list[TrainConfig]:
    """Return the runs in whose names a regular expression is found.

    Raises:
        ValueError: the expression is invalid, or is found in no name.
    """
    try:
        found = [bool(re.search(only, name)) for name in names(configs)]
    except re.error as error:
        raise ValueError(f"only={only!r} is no regular expression: {error}") from error
    if not any(found):
        raise ValueError(f"only={only!r} is found in no run; their names are like {names(configs)[0]!r}")
    return list(itertools.compress(configs, found))


def plan(configs: list[TrainConfig], results: Path, workers: int, study: Study | None = None) -> str:
    """Return in words which runs are left and how long they take; later stages of a study are not known yet."""
    waiting, total = unfinished(configs, results)
    waiting = [config for config in waiting if not equal_run(config, results, study.shares if study else ())]
    if not waiting:
        return f"{total} runs, all finished"
    alike = Counter((config.model, config.steps, config.batch, config.seq_len) for config in waiting)
    first = {(config.model, config.steps, config.batch, config.seq_len): config for config in reversed(waiting)}
    seconds = sum(count * seconds_per_run(first[size], results) for size, count in alike.items())
    hours = seconds / 3600 / workers
    listed = "\n".join(f"  {name}" for name in names(waiting))
    later = "; its results will call for more" if study and (study.more or study.grows) else ""
    return f"{listed}\n{total} runs, {len(waiting)} left: about {hours:.2f} hours with {workers} at a time{later}"


def main(
    profile: Literal["cpu", "smoke", "gpu"] = "cpu",
    workers: int = 2,
    results: Path = Path("results"),
    study: str = "ablation",
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ARM...")] = (),
    cluster: Literal["local", "slurm"] = "local",
    processes: int = 1,
    only: str = "",
    limit: float = math.inf,
    dry_run: bool = False,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
    slurm: Annotated[Slurm, tyro.conf.arg(name="")] = Slurm(),  # noqa: B008 (frozen)
) -> None:
    """Run the grid and resume interrupted runs; on a cluster, submit the runs.

    Args:
        profile: cpu (the committed results), smoke, or gpu (the paper's recipes on CUDA devices, docs/gpu.md).
        workers: number of runs at a time.
        results: root of the results folders.
        study: ablation (partitions of a Llama), carry_over (a GPT on another corpus, eight seeds), statistics (of
            blocks, other than their mean), rivals (optimizers of other authors), headline (the best of all, ten seeds),
            record (warm-up and clipping), sensitivity (betas, eps, decay), length (sizes and numbers of tokens), or a
            workload (docs/workloads.md). With profile gpu: a recipe, such as llama-39m, or all of them.
        arms: a subset of the study's arms; by default all of them.
        cluster: local (processes on this machine) or slurm (a job array; returns once it is submitted).
        processes: number of processes of each run.
        only: a regular expression; only runs in whose names it is found, such as "factored 0.003 0" (arm, learning
            rate, seed).
        limit: minutes after its start at which a run on this machine is stopped and recorded as failed, while the
            others go on; on Slurm use --time.
        dry_run: print the runs that would be started and the hours they would take, and start none of them. If no run
            is finished, ten steps are timed; with profile gpu nothing is timed, and tokens and memory are printed.
        options: options of each run that do not change its results folder.
        slurm: resources of each run on Slurm.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Every run is a separate process, so an error in this process is about the arguments.
    with refusals(ValueError, OSError, RuntimeError):
        if cluster == "slurm" and limit < math.inf:
            raise ValueError(f"limit={limit:g} is for runs on this machine; on Slurm use --time")
        if profile == "gpu":
            options, stages = dataclasses.replace(options, device="cuda"), None
            groups = {name: selected(runs, only) for name, runs in gpu_plan.chosen(study, arms).items()}
        else:
            groups = {study: grid(profile, arms or None, study)}
            stages = STUDIES[study] if profile == "cpu" else None
        wanted = [c for configs in groups.values() for c in selected(so_far(stages, configs, results), only)]
        if dry_run:
            devices = slurm.gpus or processes
            gpu = profile == "gpu"
            print(gpu_plan.text(groups, options, devices) if gpu else plan(wanted, results, workers, stages))
            return
        require_writable(results, "results")
        outcomes = []
        for configs in groups.values():
            each = Launch(processes, _fitted(options, configs, slurm.gpus or processes, profile), limit)
            if cluster == "slurm":
                if stages:
                    take_over(configs, results, stages.shares)
                jobs = submit(
                    selected(so_far(stages, configs, results), only), results, slurm=slurm, workers=workers, each=each
                )
                folder, more = results / configs[0].experiment, ", ..." * (len(jobs) > 3)
                print(f"{len(jobs)} runs submitted ({', '.join(jobs[:3])}{more}); results in {folder}")
                continue
            outcomes.append(run_stages(configs, results, stages, only=only, workers=workers, each=each))
            if outcomes[-1].interrupted:
                break
    if any(outcome.failed or outcome.interrupted for outcome in outcomes):
        raise SystemExit(1)


def run_stages(
    configs: list[TrainConfig],
    results: Path,
    study: Study | None = None,
    *,
    only: str = "",
    workers: int = 2,
    each: Launch = SINGLE,
) -> Outcome:
    """Run a grid, and then what its results call for, until nothing is left or a signal stops it.

    Args:
        configs: the grid.
        results: root of the results folders.
        study: the study that the grid belongs to; None for the grid alone.
        only: a regular expression; only runs in whose names it is found.
        workers: number of runs at a time.
        each: how to start the processes of one run.
    """
    before: list[TrainConfig] = []
    outcome, failed = Outcome(0, ()), set[Path]()
    while (wanted := selected(so_far(study, configs, results), only)) != before:
        if study and (taken := take_over(wanted, results, study.shares)):
            print(f"{taken} runs taken from {', '.join(study.shares)}")
        # What failed in this call is not tried again in it; its arm calls for no more runs, and the others go on.
        tried = [config for config in wanted if run_folder(results, config.with_rules_hash()) not in failed]
        outcome = run_many(tried, results, workers=workers, each=each)
        _report(outcome, results / configs[0].experiment)
        failed |= set(outcome.failed)
        if outcome.interrupted:
            break
        before = wanted
    return dataclasses.replace(outcome, failed=tuple(sorted(failed)))


def _fitted(options: Options, configs: list[TrainConfig], processes: int, profile: str) -> Options:
    """Return the options of a recipe's runs, with a micro-batch that is estimated to fit if none was given."""
    if profile != "gpu" or options.micro_batch:
        return options
    return dataclasses.replace(options, micro_batch=gpu_plan.fitting_micro_batch(configs[0], processes))


def _report(outcome: Outcome, folder: Path) -> None:
    print(
        f"{outcome.done} runs done, {len(outcome.failed)} failed, {len(outcome.interrupted)} interrupted; "
        f"results in {folder}"
    )


def command() -> None:
    """Run the command line. Invalid options end it with a message and exit code 2."""
    with refusals(ValueError):
        tyro.cli(main)


if __name__ == "__main__":
    command()
