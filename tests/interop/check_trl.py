"""TRL's SFTTrainer and PEFT's adapters, against plain loops."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from examples.text import tiny_llama
from tests.interop.conftest import Record
from tests.interop.launch import alone, torchrun
from tests.interop.plain import SAME, apart, case, falls, made, plain, with_rules


def adapted(**options: object) -> torch.nn.Module:
    return get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=32, **options))


def sft(record: Record, lora: str, rules: str = "adam_mini") -> None:
    """Train with TRL's SFTTrainer, all weights or adapters, against a plain loop with the same rules."""
    left = alone(with_rules(rules, "examples/trl_sft.py"), "--lora", lora)
    model = adapted(target_modules="all-linear") if lora == "yes" else tiny_llama()
    difference = apart(left["weights"], plain(model=model, optimizer=made(rules))["weights"])
    learnt = falls(left["losses"], 0.05 if lora == "yes" else 0.5)
    record(
        "TRL SFTTrainer", ("LoRA on all linear layers" if lora == "yes" else "all weights") + case(rules),
        ["trl", "transformers", "peft", "torch"],
        ran=f"examples/trl_sft.py --lora {lora}: tiny Llama, 10 clipped steps",
        result=f"{learnt}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME


def peft(record: Record, ranks: int, rules: str = "adam_mini") -> None:
    """Train adapters and a saved module in the Trainer, alone or under FSDP2, against a plain loop."""
    script = "examples/peft_lora.py"
    run = with_rules(rules, script if ranks == 1 else f"-m tests.interop.fsdp_on_cpu {script}")
    left = alone(run) if ranks == 1 else torchrun(ranks, run, "--fsdp", "2")
    model = adapted(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    difference = apart(left["weights"], plain(ranks, model=model, optimizer=made(rules))["weights"])
    record(
        "PEFT", "LoRA and a saved module, in Trainer" + (" under FSDP2" if ranks > 1 else "") + case(rules),
        ["peft", "transformers", "accelerate", "torch"], ranks=ranks, ran=f"{script}: tiny Llama, 10 clipped steps",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("lora", ["no", "yes"])
def check_sft(record: Record, lora: str) -> None:
    sft(record, lora)


@pytest.mark.parametrize("ranks", [1, 2])
def check_peft(record: Record, ranks: int) -> None:
    peft(record, ranks)
