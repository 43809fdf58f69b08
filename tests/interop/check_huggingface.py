"""Hugging Face's Trainer by every door, alone, under DDP, FSDP1 and FSDP2, against a plain loop; and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from examples.text import tiny_llama
from optimizer import AdamMini
from tests.interop.conftest import Record
from tests.interop.launch import alone, torchrun
from tests.interop.plain import OPTIONS, SAME, apart, falls, plain

SCRIPT = "examples/hf_trainer.py"
ON_CPU = f"-m tests.interop.fsdp_on_cpu {SCRIPT}"
LIBRARIES = ["transformers", "accelerate", "torch"]
DOORS = {
    "mixin": "AdamMiniMixin", "factory": "optimizer_cls_and_kwargs=(adam_mini, …)",
    "class": "optimizer_cls_and_kwargs=(AdamMini, …), tagged", "optimizers": "optimizers=(AdamMini(model), None)",
}  # fmt: skip
WRAPS = {"no": "DDP", "1": "FSDP1", "1-flat": "FSDP1, use_orig_params=False", "2": "FSDP2"}
SHARDED = [(2, "no", "mixin"), (2, "no", "optimizers"), (2, "2", "mixin"), (2, "2", "class"), (3, "2", "mixin"),
           (2, "1", "mixin"), (2, "1", "class"), (2, "1-flat", "mixin"), (3, "1-flat", "factory")]  # fmt: skip


def cosine(optimizer: torch.optim.Optimizer) -> object:
    return get_scheduler("cosine", optimizer, 2, 10)


@pytest.mark.parametrize("door", DOORS)
def check_trainer(record: Record, door: str) -> None:
    left = alone(SCRIPT, "--door", door)
    difference = apart(left["weights"], plain(schedule=cosine)["weights"])
    record(
        "Hugging Face Trainer", DOORS[door], LIBRARIES, ran=f"{SCRIPT}: tiny Llama, 10 steps, cosine, clipped, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize(("ranks", "fsdp", "door"), SHARDED)
def check_trainer_on_ranks(record: Record, ranks: int, fsdp: str, door: str) -> None:
    left = torchrun(ranks, SCRIPT if fsdp == "no" else ON_CPU, "--door", door, "--fsdp", fsdp)
    difference = apart(left["weights"], plain(ranks, schedule=cosine)["weights"])
    record(
        "Hugging Face Trainer", f"{WRAPS[fsdp]}; {DOORS[door]}", LIBRARIES, ranks=ranks,
        ran=f"{SCRIPT} --fsdp {fsdp}: tiny Llama, 10 steps, cosine, clipped, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def check_trainer_with_zero(record: Record, stage: str) -> None:
    """On processors Trainer takes itself for one process and gives both of DeepSpeed's ranks all batches."""
    left = torchrun(2, SCRIPT, "--zero", stage, DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="false")
    difference = apart(left["weights"], plain(schedule=cosine)["weights"])
    record(
        "Hugging Face Trainer", f"DeepSpeed ZeRO-{stage}; AdamMiniMixin", ["transformers", "deepspeed", "torch"],
        ranks=2,
        ran=f"{SCRIPT} --zero {stage}: tiny Llama, 10 clipped steps, cosine, fp32; the same batches on both ranks",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize(("ranks", "fsdp"), [(1, "no"), (2, "no"), (2, "2"), (2, "1")])
def check_trainer_goes_on(record: Record, tmp_path: Path, ranks: int, fsdp: str) -> None:
    """The second half, from the checkpoint in the middle, ends with the bits of the run that did not stop."""
    script = SCRIPT if fsdp == "no" else ON_CPU
    folder = ("--fsdp", fsdp, "--folder", str(tmp_path))
    whole = torchrun(ranks, script, *folder)
    again = torchrun(ranks, script, *folder, "--resume", str(tmp_path / "checkpoint-5"))
    equal = all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    record(
        "Hugging Face Trainer", f"{WRAPS[fsdp] if ranks > 1 else 'plain'}; resume_from_checkpoint", LIBRARIES,
        ranks=ranks, ran=f"{SCRIPT} --resume: 5 steps of 10 from checkpoint-5",
        result="weights bit-equal to the run without a stop" if equal else "weights differ",
    )  # fmt: skip
    assert equal


def check_schedules(record: Record) -> None:
    """Every schedule of transformers' drives AdamMini's rate as AdamW's."""
    names = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"]  # fmt: skip
    more = {"cosine_with_min_lr": {"min_lr": 1e-4}, "warmup_stable_decay": {"num_decay_steps": 4}}
    seen = 0
    for name in names:
        rates = []
        for make in (AdamMini, lambda model, **options: torch.optim.AdamW(model.parameters(), **options)):
            model = tiny_llama()
            optimizer = make(model, **OPTIONS)
            schedule = get_scheduler(name, optimizer, 3, 12, scheduler_specific_kwargs=more.get(name))
            rates.append([])
            for step in range(12):
                next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
                optimizer.step()
                schedule.step(*[1.0 + step] if name == "reduce_lr_on_plateau" else [])
                rates[-1].append(optimizer.param_groups[0]["lr"])
        assert rates[0] == rates[1], name
        seen += len(set(rates[0])) > 1
    record(
        "Hugging Face Trainer", "transformers.get_scheduler", ["transformers", "torch"],
        ran=f"12 steps under each of {len(names)} schedules", result="learning rates equal AdamW's at every step",
    )  # fmt: skip
    assert seen >= 8  # a constant schedule shows nothing
