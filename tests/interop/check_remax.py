"""ReMax under DeepSpeed's ZeRO, against one process: the policy's updates are what Adam-mini's authors shard so."""

from __future__ import annotations

import pytest

from tests.interop.conftest import Record
from tests.interop.plain import SAME
from tests.interop.remax import STEPS
from tests.sharding.workers import run

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("stage", [1, 2])
def check_remax_under_zero(record: Record, stage: int) -> None:
    answers = run(2, {"remax": ("tests.interop.remax:zero_case", {"stage": stage})}, own_interpreters=True)["remax"]
    errors = [one for one in answers if isinstance(one, str)]
    assert not errors, errors[0]
    difference = max(one["difference"] for one in answers)
    record(
        "DeepSpeed", f"ReMax, ZeRO {stage}", ["deepspeed", "torch", "transformers"], ranks=2,
        ran=f"tiny Llama, {STEPS} clipped steps on answers that each rank draws from its own module, fp32",
        result=f"weights within {difference:.1e} of one process",
    )  # fmt: skip
    assert difference <= SAME
    assert min(one["moved"] for one in answers) > 100 * SAME
