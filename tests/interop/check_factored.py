"""Factored second moments through the trainers: the examples with ``rules="factored"``, against one process.

DeepSpeed's cases are in ``check_deepspeed``. LLaMA-Factory makes the published ``Adam_mini``, which has only the
paper's rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tests.interop.check_lightning import lightning
from tests.interop.check_torchtitan import EXPERTS, SETTINGS, train
from tests.interop.check_trl import peft, sft
from tests.interop.conftest import Record
from tests.interop.launch import torchrun
from tests.interop.plain import SAME, apart, falls, made, plain, with_rules

WRAPS = {"no": "DDP", "1": "FSDP1", "1-flat": "FSDP1, use_orig_params=False", "2": "FSDP2"}
TITAN = {"FSDP2": SETTINGS, "tensor parallel x FSDP2": SETTINGS, "expert parallel": EXPERTS}


def reference(ranks: int, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a plain loop in one process."""
    weights: dict[str, torch.Tensor] = plain(ranks, optimizer=made("factored"), **options)["weights"]
    return weights


def wrapped(path: str, fsdp: str) -> str:
    return with_rules("factored", path if fsdp == "no" else f"-m tests.interop.fsdp_on_cpu {path}")


def cosine(optimizer: torch.optim.Optimizer) -> object:
    return get_scheduler("cosine", optimizer, 2, 10)


def check_ddp(record: Record) -> None:
    left = torchrun(2, wrapped("examples/ddp.py", "no"))
    difference = apart(left["weights"], reference(2))
    record(
        "DDP", "rules factored", ["torch"], ranks=2, ran="examples/ddp.py: tiny Llama, 10 clipped steps, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME
    assert apart(left["weights"], plain(2)["weights"]) > 100 * SAME  # other rules lead elsewhere


@pytest.mark.parametrize("fsdp", WRAPS)
def check_trainer(record: Record, fsdp: str) -> None:
    left = torchrun(2, wrapped("examples/hf_trainer.py", fsdp), "--door", "mixin", "--fsdp", fsdp)
    difference = apart(left["weights"], reference(2, schedule=cosine))
    record(
        "Hugging Face Trainer", f"{WRAPS[fsdp]}; AdamMiniMixin; rules factored",
        ["transformers", "accelerate", "torch"], ranks=2,
        ran=f"examples/hf_trainer.py --fsdp {fsdp}: tiny Llama, 10 steps, cosine, clipped, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("fsdp", ["no", "1", "2"])
def check_accelerate(record: Record, tmp_path: Path, fsdp: str) -> None:
    """Training, and the second half of it from a state saved in the middle."""
    run = wrapped("examples/accelerate_loop.py", fsdp)
    whole = torchrun(2, run, "--fsdp", fsdp, "--folder", str(tmp_path))
    difference = apart(whole["weights"], reference(2, schedule=cosine, accumulate=2))
    again = torchrun(2, run, "--fsdp", fsdp, "--folder", str(tmp_path), "--resume", "yes")
    apart_after = apart(again["weights"], whole["weights"])
    record(
        "Accelerate", f"{WRAPS[fsdp]}, accumulation, save_state and load_state; rules factored",
        ["accelerate", "transformers", "torch"], ranks=2,
        ran=f"examples/accelerate_loop.py --fsdp {fsdp}: tiny Llama, 10 steps of 2 batches, cosine, clipped, fp32",
        result=f"weights within {difference:.1e} of one process; "
        + ("bit-equal after going on" if apart_after == 0 else f"within {apart_after:.1e} after going on"),
    )  # fmt: skip
    # FSDP1 saves state element by element, so means of rows and columns are computed again from equal elements.
    assert difference <= SAME and apart_after <= (1e-7 if fsdp == "1" else 0)


@pytest.mark.parametrize("case", TITAN)
def check_torchtitan(record: Record, tmp_path: Path, case: str) -> None:
    ranks, settings = TITAN[case][case]
    experts = TITAN[case] is EXPERTS
    config = "deepseek_v3_processors" if experts else "llama3_processors"
    left = train(ranks, tmp_path, config, settings=settings, rules="factored")
    record(
        "torchtitan", f"{case}; rules factored", ["torchtitan", "torch"], ranks=ranks,
        ran=f"its trainer, {'DeepSeek V3' if experts else 'Llama 3'} debug model, 10 clipped steps, fp32",
        result=f"weights within {left['difference']:.1e} of one process with these gradients",
    )  # fmt: skip
    assert left["difference"] <= SAME


@pytest.mark.parametrize("devices", [1, 2])
def check_lightning(record: Record, tmp_path: Path, devices: int) -> None:
    lightning(record, tmp_path, devices, "factored")


@pytest.mark.parametrize("lora", ["no", "yes"])
def check_trl(record: Record, lora: str) -> None:
    sft(record, lora, "factored")


@pytest.mark.parametrize("ranks", [1, 2])
def check_peft(record: Record, ranks: int) -> None:
    peft(record, ranks, "factored")
