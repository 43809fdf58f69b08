"""Accelerate: prepare, accumulate, clip, save_state and load_state under DDP, FSDP1 and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import get_scheduler

from examples.text import batch, tiny_llama
from optimizer import AdamMini
from tests.interop.conftest import Record
from tests.interop.launch import alone, started, torchrun
from tests.interop.plain import OPTIONS, SAME, apart, falls, plain

SCRIPT = "examples/accelerate_loop.py"
ON_CPU = f"-m tests.interop.fsdp_on_cpu {SCRIPT}"
LIBRARIES = ["accelerate", "transformers", "torch"]
WRAPS = {"no": "DDP", "1": "FSDP1", "2": "FSDP2"}
RAN = "tiny Llama, 10 steps of 2 accumulated batches, cosine, clipped"


def cosine(optimizer: torch.optim.Optimizer) -> object:
    return get_scheduler("cosine", optimizer, 2, 10)


@pytest.mark.parametrize("fsdp", WRAPS)
def check_two_ranks(record: Record, tmp_path: Path, fsdp: str) -> None:
    """Training, and the second half of it from a state saved in the middle."""
    script = SCRIPT if fsdp == "no" else ON_CPU
    whole = torchrun(2, script, "--fsdp", fsdp, "--folder", str(tmp_path))
    difference = apart(whole["weights"], plain(2, schedule=cosine, accumulate=2)["weights"])
    record(
        "Accelerate", f"{WRAPS[fsdp]}, gradient accumulation", LIBRARIES, ranks=2,
        ran=f"{SCRIPT} --fsdp {fsdp}: {RAN}, fp32",
        result=f"{falls(whole['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME
    again = torchrun(2, script, "--fsdp", fsdp, "--folder", str(tmp_path), "--resume", "yes")
    equal = all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    record(
        "Accelerate", f"{WRAPS[fsdp]}, save_state and load_state", LIBRARIES, ranks=2,
        ran=f"{SCRIPT} --fsdp {fsdp} --resume yes: 5 steps of 10 from the saved state",
        result="weights bit-equal to the run without a stop" if equal else "weights differ",
    )  # fmt: skip
    assert equal


def check_accelerate_launch(record: Record) -> None:
    """Its own launcher; on processors it starts one process, and leaves more to MPI."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--num_cpu_threads_per_process", "1", "--main_process_port", "0", SCRIPT]  # fmt: skip
    left = started(launch)
    difference = apart(left["weights"], plain(schedule=cosine, accumulate=2)["weights"])
    record(
        "Accelerate", "accelerate launch --cpu", LIBRARIES, ran=f"{SCRIPT}: {RAN}, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME


def check_bf16(record: Record) -> None:
    """Mixed precision: fp32 weights, products in bf16."""
    left = alone(SCRIPT, "--precision", "bf16")
    model = tiny_llama()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    difference = apart(left["weights"], plain(schedule=cosine, accumulate=2, model=model)["weights"])
    record(
        "Accelerate", "mixed_precision=bf16", LIBRARIES, ran=f"{SCRIPT} --precision bf16: {RAN}",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of a loop under autocast",
    )  # fmt: skip
    assert difference <= SAME


def check_grad_scaler(record: Record) -> None:
    """AcceleratedOptimizer with a scaler, as mixed_precision=fp16 makes it on a GPU: steps unscaled, or not at all."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, reference = tiny_llama(), tiny_llama()
    optimizer = AcceleratedOptimizer(AdamMini(model, **OPTIONS), scaler=scaler)
    wanted = AdamMini(reference, **OPTIONS)
    for step in range(5):
        for one, scale in ((model, scaler.scale), (reference, lambda loss: loss)):
            one.zero_grad()
            tokens = batch(step)
            scale(one(input_ids=tokens, labels=tokens).loss).backward()
        if step == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped == (step == 2)
        if step != 2:
            wanted.step()
    difference = apart(model.state_dict(), reference.state_dict())
    record(
        "Accelerate", "AcceleratedOptimizer with a GradScaler", ["accelerate", "torch"],
        ran="5 scaled steps, one with an infinite gradient",
        result=f"that one skipped; weights within {difference:.1e} of steps without a scaler",
    )  # fmt: skip
    assert difference <= SAME
    document = optimizer.state_dict()
    fresh = AcceleratedOptimizer(AdamMini(tiny_llama(), **OPTIONS))
    fresh.load_state_dict(document)
    assert [s["step"] for s in fresh.state_dict()["state"].values()] == [4.0] * len(document["state"])
