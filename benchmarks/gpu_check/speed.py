"""Time and memory of a step beside torch's fused AdamW, interleaved, on the shapes of GPT-2 124M and a Llama."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_check.correctness import DTYPES, parameters_of
from benchmarks.gpu_check.verdict import Check, Evidence, NotRun
from experiments.models import GPTConfig, LlamaConfig, ModelConfig, build
from experiments.recipes import gpt2_125m, llama_271m
from optimizer import AdamMini

MODELS: dict[str, ModelConfig] = {"GPT-2 124M": gpt2_125m().model, "Llama 271M": llama_271m().model}
BASELINE = "torch AdamW fused"
CONTESTANTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    BASELINE: lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True),
    "AdamMini": lambda model: AdamMini(model, lr=1e-4, weight_decay=0.1),
    "AdamMini foreach": lambda model: AdamMini(model, lr=1e-4, weight_decay=0.1, foreach=True),
    "AdamMini factored": lambda model: AdamMini(model, lr=1e-4, weight_decay=0.1, rules="factored"),
    "AdamMini elementwise": lambda model: AdamMini(model, lr=1e-4, weight_decay=0.1, rules="elementwise"),
}
ROUNDS, WARM_UP = 50, 5


@dataclass(frozen=True)
class Row:
    """One contestant's measurement.

    Attributes:
        model: name of the shapes.
        dtype: dtype of parameters and gradients.
        contestant: name of the optimizer.
        median_ms: median time of a step.
        q1_ms: first quartile.
        q3_ms: third quartile.
        n: number of timed steps.
        ratio: median over rounds of the time divided by the baseline's in the same round.
        state_mib: memory of the optimizer's state.
        peak_mib: memory that a step allocates beyond what it held before.
    """

    model: str
    dtype: str
    contestant: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    n: int
    ratio: float
    state_mib: float
    peak_mib: float


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of a call: between two events of the device's stream, or on the clock of a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the MiB that a call allocates on the device beyond what was allocated before; NaN on a CPU."""
    if device.type != "cuda":
        call()
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(
    model: ModelConfig, name: str, dtype: str, device: torch.device, evidence: Evidence, rounds: int = ROUNDS
) -> list[Row]:
    """Time all contestants on the shapes of a model. Each has parameters and gradients of its own.

    Args:
        model: the model's sizes.
        name: its name.
        dtype: key of ``DTYPES``.
        device: where.
        evidence: receives the devices of the parameters.
        rounds: number of timed rounds.
    """
    optimizers = {}
    for contestant, make in CONTESTANTS.items():
        with torch.device("meta"):
            module = build(model, 0)
        module = module.to(DTYPES[dtype]).to_empty(device=device)
        if getattr(model, "tied", False):
            module.lm_head.weight = module.transformer["wte"].weight  # to_empty separates tied weights
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
            p.grad = 1e-3 * torch.randn_like(p)
        optimizers[contestant] = make(module)
    for optimizer in optimizers.values():
        for _ in range(WARM_UP):  # the first compiles kernels and creates the state
            optimizer.step()
        evidence.saw(parameters_of(optimizer))
    times: dict[str, list[float]] = {contestant: [] for contestant in optimizers}
    for _ in range(rounds):
        for contestant, optimizer in optimizers.items():
            times[contestant].append(timed(optimizer.step, device))
    rows = []
    for contestant, optimizer in optimizers.items():
        values = times[contestant]
        q1, median, q3 = statistics.quantiles(values, n=4)
        ratio = statistics.median(a / b for a, b in zip(values, times[BASELINE], strict=True))
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        peak = peak_of(optimizer.step, device)
        rows.append(Row(name, dtype, contestant, median, q1, q3, len(values), ratio, state / 2**20, peak))
    return rows


def small(model: ModelConfig) -> ModelConfig:
    """Return the model with two layers, for a device on which nothing is to be learnt from the times."""
    if isinstance(model, GPTConfig):
        return replace(model, n_layer=2, vocab=512)
    assert isinstance(model, LlamaConfig)
    return replace(model, n_layers=2, vocab=512)


def checks(rows: list[Row], rounds: int = ROUNDS) -> tuple[Check, ...]:
    """Return a check for each model and dtype; a check only measures, and fails if a step does.

    Args:
        rows: receives the measurements.
        rounds: number of timed rounds.
    """

    def check(name: str, dtype: str) -> Check:
        def run(device: torch.device) -> Evidence:
            evidence = Evidence()
            if device.type == "meta":
                raise NotRun("a meta device computes nothing that could be timed")
            model = MODELS[name] if device.type == "cuda" else small(MODELS[name])
            found = measure(model, name, dtype, device, evidence, rounds)
            rows.extend(found)
            ratios = ", ".join(f"{row.contestant} {row.ratio:.2f}x" for row in found[1:])
            evidence.note = f"{BASELINE} {found[0].median_ms:.2f} ms; {ratios}"
            return evidence

        return Check(f"step time, {name}, {dtype}", run)

    return tuple(check(name, dtype) for name in MODELS for dtype in ("fp32", "bf16"))
