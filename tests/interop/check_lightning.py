"""Lightning: one process and DDP on two ranks against a plain loop, and from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.interop.conftest import Record
from tests.interop.launch import alone, torchrun
from tests.interop.plain import SAME, apart, case, falls, made, plain, with_rules

SCRIPT = "examples/lightning_module.py"
LIBRARIES = ["pytorch-lightning", "torch"]


def lightning(record: Record, tmp_path: Path, devices: int, rules: str = "adam_mini") -> None:
    """Train, and the second half again from a checkpoint, against a plain loop with the same rules."""
    folder, run = ("--devices", str(devices), "--folder", str(tmp_path)), with_rules(rules, SCRIPT)
    whole = torchrun(2, run, *folder) if devices == 2 else alone(run, *folder)
    wanted = plain(
        devices,
        optimizer=made(rules),
        schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20),
    )
    difference = apart(whole["weights"], wanted["weights"])
    name = "DDP" if devices == 2 else "one device"
    record(
        "Lightning", name + case(rules), LIBRARIES, ranks=devices,
        ran=f"{SCRIPT}: tiny Llama, 10 steps, cosine, clipped, fp32",
        result=f"{falls(whole['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME
    resume = ("--resume", str(tmp_path / "step=5.ckpt"))
    again = torchrun(2, run, *folder, *resume) if devices == 2 else alone(run, *folder, *resume)
    equal = all(torch.equal(again["weights"][key], w) for key, w in whole["weights"].items())
    record(
        "Lightning", f"{name}, fit(ckpt_path=…)" + case(rules), LIBRARIES, ranks=devices,
        ran=f"{SCRIPT} --resume: from step 5 of 10",
        result="weights bit-equal to the run without a stop" if equal else "weights differ",
    )  # fmt: skip
    assert equal and len(again["losses"]) == 5


@pytest.mark.parametrize("devices", [1, 2])
def check_lightning(record: Record, tmp_path: Path, devices: int) -> None:
    lightning(record, tmp_path, devices)
