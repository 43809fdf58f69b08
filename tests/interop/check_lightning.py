"""Lightning: one process and DDP on two ranks against a plain loop, and from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.interop.conftest import Record
from tests.interop.launch import alone, torchrun
from tests.interop.plain import SAME, apart, falls, plain

SCRIPT = "examples/lightning_module.py"
LIBRARIES = ["pytorch-lightning", "torch"]


@pytest.mark.parametrize("devices", [1, 2])
def check_lightning(record: Record, tmp_path: Path, devices: int) -> None:
    folder = ("--devices", str(devices), "--folder", str(tmp_path))
    whole = torchrun(2, SCRIPT, *folder) if devices == 2 else alone(SCRIPT, *folder)
    wanted = plain(devices, schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20))
    difference = apart(whole["weights"], wanted["weights"])
    case = "DDP" if devices == 2 else "one device"
    record(
        "Lightning", case, LIBRARIES, ranks=devices, ran=f"{SCRIPT}: tiny Llama, 10 steps, cosine, clipped, fp32",
        result=f"{falls(whole['losses'])}; weights within {difference:.1e} of a plain loop",
    )  # fmt: skip
    assert difference <= SAME
    resume = ("--resume", str(tmp_path / "step=5.ckpt"))
    again = torchrun(2, SCRIPT, *folder, *resume) if devices == 2 else alone(SCRIPT, *folder, *resume)
    equal = all(torch.equal(again["weights"][name], w) for name, w in whole["weights"].items())
    record(
        "Lightning", f"{case}, fit(ckpt_path=…)", LIBRARIES, ranks=devices, ran=f"{SCRIPT} --resume: from step 5 of 10",
        result="weights bit-equal to the run without a stop" if equal else "weights differ",
    )  # fmt: skip
    assert equal and len(again["losses"]) == 5
