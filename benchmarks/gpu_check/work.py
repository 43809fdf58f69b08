"""Checks of what surrounds a step: compiled and captured steps, streams, memory, and a short training run."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.correctness import LLAMA, NUMBERS, STEPS, compare, parameters_of, set_gradients, subjects
from benchmarks.gpu_check.verdict import Check, Evidence, NotRun
from experiments.configs import smoke
from experiments.models import build, lm_loss
from experiments.train import Options, run_folder, train
from optimizer import AdamMini
from optimizer.memory.offload import CPUOffload
from optimizer.memory.release import gradient_release


def compiled_step(device: torch.device) -> Evidence:
    """``torch.compile(optimizer.step)`` against the reference, with a learning rate that changes between steps."""
    evidence, compiled = Evidence(), {}

    def step(optimizer: AdamMini) -> None:
        if id(optimizer) not in compiled:
            compiled[id(optimizer)] = torch.compile(optimizer.step)
        compiled[id(optimizer)]()

    worst = max(compare(subject, "fp32", evidence, step) for subject in subjects(device, torch.float32).values())
    evidence.note = f"largest error {worst:.2f} of what is allowed"
    return evidence


def captured_step(device: torch.device) -> Evidence:
    """A step captured in a CUDA graph and replayed, against the same steps without a graph; lr is a tensor."""
    if device.type != "cuda":
        raise NotRun(f"CUDA graphs exist on CUDA devices only, and this is {device}")
    evidence = Evidence()
    for options in ({}, {"foreach": True}, {"rules": "factored"}):
        models = [build(LLAMA, 0).to(device) for _ in range(2)]
        rate = torch.tensor(NUMBERS["lr"], device=device)
        numbers = NUMBERS | {"lr": rate, "capturable": True}
        graphed, plain = (AdamMini(model, **numbers, **options) for model in models)
        for optimizer in (graphed, plain):
            set_gradients(parameters_of(optimizer), 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # state and tables have to exist before a capture
            graphed.step()
        torch.cuda.current_stream().wait_stream(side)
        plain.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed.step()  # is recorded, and not run
        for seed in range(1, STEPS + 1):
            rate.fill_(NUMBERS["lr"] / seed)
            for optimizer in (graphed, plain):
                fresh = [torch.empty_like(p) for p in parameters_of(optimizer)]
                for p, new, i in zip(parameters_of(optimizer), fresh, range(len(fresh)), strict=True):
                    new.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)))
                    p.grad.copy_(new)  # type: ignore[union-attr]
            graph.replay()
            plain.step()
        torch.cuda.synchronize()
        worst = _difference(parameters_of(graphed), parameters_of(plain))
        assert worst <= 1e-6, f"{options}: a replayed step differs by {worst:.1e}"
        counters = {float(s["step"]) for s in graphed.state.values()}
        assert counters == {float(STEPS + 1)}, f"{options}: counters are {counters}"
        evidence.saw(parameters_of(graphed))
    evidence.note = f"{STEPS} replays for the default engine, foreach and factored moments equal steps without a graph"
    return evidence


def side_stream(device: torch.device) -> Evidence:
    """Steps on a side stream while the main stream is busy, against steps on the main stream."""
    if device.type != "cuda":
        raise NotRun(f"streams exist on CUDA devices only, and this is {device}")
    evidence, optimizers = Evidence(), [AdamMini(build(LLAMA, 0).to(device), **NUMBERS) for _ in range(2)]
    busy, stream = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    for seed in range(20):
        for optimizer in optimizers:
            set_gradients(parameters_of(optimizer), seed)
        optimizers[0].step()
        for _ in range(10):
            busy = torch.tanh(busy @ busy)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizers[1].step()
        torch.cuda.current_stream().wait_stream(stream)
    worst = _difference(*(parameters_of(o) for o in optimizers))
    assert worst == 0, f"20 steps on a side stream differ by {worst:.1e}"
    evidence.saw(parameters_of(optimizers[1]))
    evidence.note = "20 steps have the bits of those on the main stream"
    return evidence


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference of two lists of tensors."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))


def _trained(
    device: torch.device, make: Callable[[nn.Module], torch.optim.Optimizer], around: Any = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a small model on fixed random tokens for five steps, with an attention whose bits can be repeated."""
    model = copy.deepcopy(build(LLAMA, 0)).to(device)
    optimizer = make(model)
    if around is not None:
        around(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens = torch.randint(LLAMA.vocab, (4, 25), generator=generator).to(device)
        with sdpa_kernel(SDPBackend.MATH):
            lm_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def released_gradients(device: torch.device) -> Evidence:
    """Gradient release against ``backward(); step()``: equal bits, and no gradient left."""
    evidence = Evidence()
    plain, _ = _trained(device, lambda model: AdamMini(model, **NUMBERS))
    released, optimizer = _trained(device, lambda model: AdamMini(model, **NUMBERS), gradient_release)
    worst = _difference(list(released.parameters()), list(plain.parameters()))
    assert worst == 0, f"five steps differ by {worst:.1e}"
    assert all(p.grad is None for p in released.parameters()), "a gradient was not freed"
    evidence.saw(parameters_of(optimizer))
    evidence.note = "five steps have the bits of backward and step"
    return evidence


def offloaded(free: bool) -> Callable[[torch.device], Evidence]:
    """Return a check of ``CPUOffload``: its state is on the host, and its parameters are those of a step on the CPU."""

    def run(device: torch.device) -> Evidence:
        evidence = Evidence()
        plain, _ = _trained(device, lambda model: AdamMini(model, **NUMBERS))
        model, optimizer = _trained(device, lambda model: CPUOffload(model, **NUMBERS, offload_gradients=free))
        worst = _difference(list(model.parameters()), list(plain.parameters()))
        assert worst <= 1e-4, f"five steps differ by {worst:.1e} from those on {device}"
        where = {s["exp_avg"].device.type for s in optimizer.state.values()}
        assert where == {"cpu"}, f"the state is on {where}"
        evidence.saw(model.parameters())
        evidence.note = f"state on the host; largest difference {worst:.1e} to steps on {device}"
        return evidence

    return run


def training(device: torch.device, compile: bool = False, precision: str = "fp32") -> Evidence:
    """Train the smoke config for 20 steps on the device and on the CPU, with the same batches; compare the losses."""
    config = smoke()
    evidence, losses = Evidence(), []
    with tempfile.TemporaryDirectory() as root:
        for where in (device.type, "cpu"):
            here = Path(root) / f"{len(losses)}"
            on_device = not losses
            run = dataclasses.replace(config, precision=precision) if on_device else config
            options = Options(compile=compile and on_device, micro_batch=2 if on_device else 0)
            options = dataclasses.replace(options, device=where)
            status = train(run, here, options)
            assert status["state"] == "finished", f"on {where} the run ended as {status['state']}"
            losses.append(status["final_val_loss"])
            if on_device:
                how = json.loads((run_folder(here, run.with_rules_hash()) / "environment.json").read_text())
                evidence.devices.add(how["parameters_on"])
    bound = 2e-3 if precision == "fp32" else 3e-2
    assert abs(losses[0] - losses[1]) <= bound, f"validation loss {losses[0]:.4f}, on the CPU {losses[1]:.4f}"
    evidence.note = f"validation loss {losses[0]:.5f}, on the CPU in fp32 {losses[1]:.5f}"
    return evidence


CHECKS = (
    Check("compiled optimizer step", compiled_step),
    Check("step captured in a CUDA graph", captured_step),
    Check("step on a side stream", side_stream),
    Check("gradient release", released_gradients),
    Check("offload of the state", offloaded(False)),
    Check("offload of state and gradients", offloaded(True)),
    Check("training, fp32", training),
    Check("training, bf16", lambda device: training(device, precision="bf16")),
    Check("training, bf16 and compiled layers", lambda device: training(device, True, "bf16")),
)
"""The checks of what surrounds a step."""
