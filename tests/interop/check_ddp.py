"""DistributedDataParallel, as users run it."""

from __future__ import annotations

import pytest

from tests.interop.conftest import Record
from tests.interop.launch import torchrun
from tests.interop.plain import SAME, apart, falls, plain


@pytest.mark.parametrize("ranks", [2, 3])
def check_ddp(record: Record, ranks: int) -> None:
    left = torchrun(ranks, "examples/ddp.py")
    difference = apart(left["weights"], plain(ranks)["weights"])
    record(
        "DDP", "as it stands", ["torch"], ranks=ranks, ran="examples/ddp.py: tiny Llama, 10 clipped steps, fp32",
        result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME
