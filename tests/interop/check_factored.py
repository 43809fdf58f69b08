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

from optimizer import AdamMini
from tests.interop.check_torchtitan import EXPERTS, SETTINGS, train
from tests.interop.check_trl import adapted
from tests.interop.conftest import Record
from tests.interop.launch import alone, torchrun
from tests.interop.plain import OPTIONS, SAME, apart, falls, plain

RULES = "-m tests.interop.with_rules factored"
WRAPS = {"no": "DDP", "1": "FSDP1", "1-flat": "FSDP1, use_orig_params=False", "2": "FSDP2"}
TITAN = {"FSDP2": SETTINGS, "tensor parallel x FSDP2": SETTINGS, "expert parallel": EXPERTS}


def reference(ranks: int, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a plain loop in one process."""
    weights: dict[str, torch.Tensor] = plain(
        ranks, optimizer=lambda model: AdamMini(model, **OPTIONS, rules="factored"), **options
    )["weights"]
    return weights


def wrapped(path: str, fsdp: str) -> str:
    return f"{RULES} {path}" if fsdp == "no" else f"{RULES} -m tests.interop.fsdp_on_cpu {path}"


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
    """Training, and the second half of it from a checkpoint."""
    start = alone if devices == 1 else lambda *given: torchrun(2, *given)
    run = f"{RULES} examples/lightning_module.py"
    folder = ("--devices", str(devices), "--folder", str(tmp_path))
    whole = start(run, *folder)
    wanted = reference(devices, schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20))
    difference = apart(whole["weights"], wanted)
    again = start(run, *folder, "--resume", str(tmp_path / "step=5.ckpt"))
    equal = all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    record(
        "Lightning", f"{'one device' if devices == 1 else 'DDP'}, fit(ckpt_path=…); rules factored",
        ["pytorch-lightning", "torch"], ranks=devices,
        ran="examples/lightning_module.py: tiny Llama, 10 steps, cosine, clipped, fp32, and again from step 5",
        result=f"{falls(whole['losses'])}; weights within {difference:.1e} of a plain loop; "
        + ("bit-equal after going on" if equal else "weights differ after going on"),
    )  # fmt: skip
    assert difference <= SAME and equal


@pytest.mark.parametrize("lora", ["no", "yes"])
def check_trl(record: Record, lora: str) -> None:
    left = alone(f"{RULES} examples/trl_sft.py", "--lora", lora)
    model = {"model": adapted(target_modules="all-linear")} if lora == "yes" else {}
    difference = apart(left["weights"], reference(1, **model))
    learnt = falls(left["losses"], 0.05 if lora == "yes" else 0.5)
    record(
        "TRL SFTTrainer", ("LoRA on all linear layers" if lora == "yes" else "all weights") + "; rules factored",
        ["trl", "transformers", "peft", "torch"],
        ran=f"examples/trl_sft.py --lora {lora}: tiny Llama, 10 clipped steps",
        result=f"{learnt}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("ranks", [1, 2])
def check_peft(record: Record, ranks: int) -> None:
    script = "examples/peft_lora.py"
    left = alone(f"{RULES} {script}") if ranks == 1 else torchrun(ranks, wrapped(script, "2"), "--fsdp", "2")
    model = adapted(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    difference = apart(left["weights"], reference(ranks, model=model))
    record(
        "PEFT", "LoRA and a saved module, in Trainer" + (" under FSDP2" if ranks > 1 else "") + "; rules factored",
        ["peft", "transformers", "accelerate", "torch"], ranks=ranks, ran=f"{script}: tiny Llama, 10 clipped steps",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME
