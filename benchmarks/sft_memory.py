"""Where the memory of fine-tuning goes: one step of SmolLM2-135M under several optimizers, and the plan of Llama 2-7B.

    make setup-workloads
    .venv/workloads/bin/python -m benchmarks.sft_memory
    .venv/workloads/bin/python -m benchmarks.sft_memory --docs docs/sft_memory.md

Every optimizer is measured in a process of its own: its resident memory in one step, and every allocation in the next
(``benchmarks.allocations``). ``--docs`` writes the page from the results and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocations import AllocationsByKind, moments_of, peak_resident, resident
from benchmarks.common import RESULTS, replace, write
from benchmarks.memory import allocations
from benchmarks.sft_memory_page import largest_batch, page
from experiments.workloads.libraries import library
from optimizer import AdamMini
from optimizer.memory import gradient_release
from optimizer.tools.plan import Setup, make_plan, parameters_of
from optimizer.tools.targets import load_target

logger = logging.getLogger("benchmarks")
ROWS, LENGTH = 4, 256
"""Sequences and tokens of a step: those of the workload ``sft``."""
OPTIONS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0}
Make = Callable[[nn.Module], torch.optim.Optimizer]
CONTESTANTS: dict[str, Make] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), **OPTIONS),
    "adam_mini": lambda model: AdamMini(model, **OPTIONS),
    "factored, int8 moment, gradient release": lambda model: (
        gradient_release(AdamMini(model, rules="factored", exp_avg_dtype="int8", **OPTIONS)).optimizer
    ),
}
DEVICES = (2, 8)
PLANNED = (
    ("AdamW, fp32 states", None, "elementwise"),
    ("adam_mini", None, "adam_mini"),
    ("factored", "int8", "factored"),
)
"""Rows of the plan of Llama 2-7B: label, first moment, rule set."""
MICRO_BATCH, SEQUENCE, VOCABULARY = 20, 1024, 32_000
"""Sequences per GPU and their tokens in Adam-mini's fine-tuning of Llama 2-7B (github.com/zyushun/Adam-mini,
examples/RLHF/training_scripts/sft/run_sft_full.sh), and the tokens of Llama 2."""


class Step:
    """One step of fine-tuning: forward and backward pass in bf16 autocast over fp32 weights, then the optimizer.

    Gradients are freed at the beginning of a step, so they do not add to the activations. They are not clipped, because
    gradient release steps before all of them are known.

    Args:
        make: makes the optimizer.
        rows: sequences of a step.
    """

    def __init__(self, make: Make, rows: int = ROWS) -> None:
        from experiments.workloads.bases import load_base

        model = load_base("smollm2", 0, seed=0).model
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # its own memory, not a file's that is mapped into it
        self.model, self.optimizer = model, make(model)
        self.tokens = torch.randint(0, 49_000, (rows, LENGTH), generator=torch.Generator().manual_seed(0))

    def run(self, phase: Callable[[str], None] = lambda name: None) -> None:
        """Take one step; ``phase`` is told what begins."""
        self.optimizer.zero_grad(set_to_none=True)
        phase("forward")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        phase("backward")
        loss.backward()
        phase("step")
        self.optimizer.step()


def measured(name: str) -> dict[str, Any]:
    """Take a first step, measure the resident memory of a second one, and follow the allocations of a third.

    Args:
        name: a contestant.

    Returns:
        Bytes. ``baseline`` and ``resident``: resident memory before the model is there, and at most in the second step;
        ``files``: by how much its part from files has grown. ``held``: parameters and state between steps.
        ``allocated``: what torch has allocated at most in the third step; ``followed`` and ``kinds``: what was followed
        of it, at its peak in the phase ``phase``.
    """
    library("transformers", "fine-tuning")  # its code is part of the baseline
    torch.set_num_threads(1)
    baseline, files = resident(), resident("RssFile")
    step = Step(CONTESTANTS[name])
    step.run()
    with peak_resident() as peak:
        step.run()
    found: dict[str, Any] = {"baseline": baseline, "resident": peak(), "files": resident("RssFile") - files}
    step.optimizer.zero_grad(set_to_none=True)
    held = {"parameters": sum(p.nbytes for p in step.model.parameters()), **moments_of(step.optimizer)}
    with AllocationsByKind(step.model, step.optimizer, ROWS * LENGTH, 49_152) as kinds:
        extra = allocations(lambda: step.run(kinds.begin)).peak
    return {**found, "held": held, "allocated": sum(held.values()) + extra, **kinds.result()}


def in_own_process(name: str) -> dict[str, Any]:
    """Measure in a new process.

    Raises:
        RuntimeError: the process failed; the message has its last words.
    """
    command = [sys.executable, "-m", "benchmarks.sft_memory", "--one", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring {name!r} failed:\n{result.stderr[-2000:]}")
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


def planned() -> list[dict[str, Any]]:
    """Return bytes per device of fine-tuning Llama 2-7B under ZeRO-2: bf16 weights, fp32 master copy and moments."""
    library("transformers", "the plan")
    with torch.device("meta"):
        model = load_target("llama-2-7b")
    parameters, rows = parameters_of(model), []
    config: Any = model.config
    # Korthikanti et al., arXiv 2205.05198, section 5: fully recomputed layers keep their inputs alone, 2sbh bytes each.
    inputs = 2 * SEQUENCE * MICRO_BATCH * config.hidden_size * config.num_hidden_layers
    for world in DEVICES:
        for label, moment, rules in PLANNED:
            setup = Setup(world, sharding="zero2", dtype="bf16", exp_avg_dtype=moment, master=True)
            plan = make_plan(parameters, setup, (rules,))
            row = plan.row(label) if label.startswith("AdamW") else plan.row(f"Adam-mini, {rules}")
            first = row.state.exp_avg + row.state.scales
            rows.append(
                {
                    "devices": world,
                    "optimizer": label + (f", {moment} moment" if moment else ""),
                    "parameters": row.parameters,
                    "gradients": row.gradients,
                    "master": row.master,
                    "first moment": first,
                    "second moment": row.state.total - first,
                    "inputs of layers": inputs,
                    "logits": MICRO_BATCH * SEQUENCE * VOCABULARY * 4,
                }
            )
    return rows


def main() -> None:
    """Measure all contestants and write ``benchmarks/results/sft_memory.json``, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="write this page from the results and measure nothing")
    parser.add_argument("--one", choices=tuple(CONTESTANTS), help="measure one optimizer in this process, print JSON")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), help="measure these optimizers alone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.docs:
        batches = RESULTS / "largest_batch.json"
        more = "\n" + largest_batch(json.loads(batches.read_text())) if batches.is_file() else ""
        replace(arguments.docs, page(json.loads((RESULTS / "sft_memory.json").read_text())) + more)
        return
    if arguments.one:
        sys.stdout.write(json.dumps(measured(arguments.one)) + "\n")
        return
    torch.set_num_threads(1)
    plan, rows = planned(), {}
    for name in arguments.only or CONTESTANTS:
        rows[name] = in_own_process(name)
        logger.info("%s: %s", name, json.dumps(rows[name]))
    options = {"micro_batch": MICRO_BATCH, "sequence": SEQUENCE, "vocabulary": VOCABULARY}
    document = {"rows_of_batch": ROWS, "length": LENGTH, "rows": rows, "plan": plan, "plan_options": options}
    logger.info("written to %s", write("sft_memory", document))


if __name__ == "__main__":
    main()
