"""DeepSpeed's ZeRO and its other optimizers around AdamMini, against one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from optimizer import AdamMini
from optimizer.sharding import offline
from optimizer.tools.plan import Setup, parameters_of
from tests.interop.conftest import Record
from tests.interop.launch import torchrun
from tests.interop.plain import OPTIONS, SAME, apart, falls, plain
from tests.interop.zero_checkpoints import convert
from tests.optimizer.test_plan_shards import planned
from tests.sharding import models
from tests.sharding.workers import Case, run

STAGE3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
"""Several sub-groups to each of the optimizer's groups."""
HOST = {"offload_optimizer": {"device": "cpu"}}
TRAIN, SHADOW = "tests.interop.zero:zero_case", "tests.interop.zero:shadow_case"
CASES: dict[str, dict[str, Any]] = {
    "0": {"zero": {"stage": 0}},
    "1": {"zero": {"stage": 1}},
    "1, offloaded": {"zero": {"stage": 1} | HOST},
    "2": {"zero": {"stage": 2}},
    "2, offloaded": {"zero": {"stage": 2} | HOST},
    "2, round robin": {"zero": {"stage": 2, "round_robin_gradients": True}},
    "3": {"zero": STAGE3},
    "3, weights and optimizer offloaded": {"zero": STAGE3 | HOST | {"offload_param": {"device": "cpu"}}},
    "3, model made in zero.Init": {"zero": STAGE3 | {"init": True}},
}
BUILT: dict[str, dict[str, Any]] = {
    "named parameters": {"kind": "names", "zero": {"stage": 1}},
    "from adam_mini import Adam_mini": {"kind": "door", "zero": {"stage": 2}},
    "tagged parameters": {"kind": "tags", "zero": {"stage": 2}},
    "tagged parameters, zero.Init": {"kind": "tags", "zero": STAGE3 | {"init": True}},
    "own groups": {"kind": "groups", "zero": {"stage": 2}},
    "own groups, stage 3": {"kind": "groups", "zero": STAGE3},
    "rules slim_adam": {"zero": STAGE3, "rules": "slim_adam"},
    "rules factored, stage 1 offloaded": {"zero": {"stage": 1} | HOST, "rules": "factored"},
    "rules factored, stage 2": {"zero": {"stage": 2}, "rules": "factored"},
    "rules factored, stage 3": {"zero": STAGE3, "rules": "factored"},
}
FEW_BITS: dict[str, dict[str, Any]] = {
    f"{stage}, {moment}": {**CASES[stage], "exp_avg_dtype": moment}
    for stage in ("1", "1, offloaded", "2", "2, offloaded", "3", "3, weights and optimizer offloaded")
    for moment in ("int8", "int4")
} | {
    "2, offloaded, int8, rules factored": {**CASES["2, offloaded"], "exp_avg_dtype": "int8", "rules": "factored"},
    "3, int4, rules factored": {**CASES["3"], "exp_avg_dtype": "int4", "rules": "factored"},
}  # fmt: skip
FEW_STEPS = 3
"""Later, elements whose gradients differ in the last bit round to other codes, and change the gradients of others."""
MODELS = ("llama", "gpt2", "mixtral")


@lru_cache(maxsize=4)
def trained(ranks: int) -> dict[str, list[Any]]:
    """All cases on so many ranks, in one start of the processes."""
    cases: dict[str, Case] = {
        f"{model} {stage}": (TRAIN, {"model": model, **case}) for model in MODELS for stage, case in CASES.items()
    }
    if ranks == 2:
        cases |= {built: (TRAIN, {"model": "llama", **case}) for built, case in BUILT.items()}
        few = {"model": "wide", "taken": FEW_STEPS}
        cases |= {f"few bits {name}": (TRAIN, few | case) for name, case in FEW_BITS.items()}
        stages: tuple[dict[str, Any], ...] = ({"stage": 1}, {"stage": 2}, STAGE3)
        cases |= {f"bf16 {zero['stage']}": (SHADOW, {"model": "llama", "zero": zero}) for zero in stages}
        moves = {"1 to 3": ({"stage": 1}, STAGE3), "3 to 2": (STAGE3, {"stage": 2})}
        cases |= {f"whole state {name}": ("tests.interop.zero:whole_state_case",
                                          {"model": "gpt2", "zero": zero, "then": then})
                  for name, (zero, then) in moves.items()}  # fmt: skip
        cases["refused"] = ("tests.interop.zero:refused_case", {})
    return run(ranks, cases, timeout=1500, own_interpreters=True)


def worst(answers: list[Any]) -> float:
    """The largest difference of any rank; an error's text fails the check."""
    errors = [one for one in answers if isinstance(one, str)]
    assert not errors, errors[0]
    return max(one["difference"] for one in answers)


pytestmark = pytest.mark.timeout(1800)  # the first check waits for all cases of its number of ranks


@pytest.mark.parametrize("stage", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def check_zero(record: Record, ranks: int, stage: str) -> None:
    answers = {model: trained(ranks)[f"{model} {stage}"] for model in MODELS}
    difference = max(worst(each) for each in answers.values())
    sent = max(one["largest"] for each in answers.values() for one in each)
    record(
        "DeepSpeed", f"ZeRO {stage}", ["deepspeed", "torch"], ranks=ranks,
        ran="deepspeed.initialize as it stands; Llama, GPT-2, Mixtral, 10 clipped steps, fp32",
        result=f"weights within {difference:.1e} of one process; at most {sent} bytes a step",
    )  # fmt: skip
    assert difference <= SAME
    assert all(one["largest"] <= 8 * one["blocks"] for each in answers.values() for one in each)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
@pytest.mark.parametrize("ranks", [2, 3])
def check_planned_bytes(monkeypatch: pytest.MonkeyPatch, ranks: int, stage: str) -> None:
    monkeypatch.setattr(offline.sub_groups, "__defaults__", (STAGE3["sub_group_size"],))
    setup = Setup(world=ranks, sharding=f"zero{stage}", dtype="fp32")
    for model in MODELS:
        held = [one["state"] for one in trained(ranks)[f"{model} {stage}"]]
        assert held == planned(parameters_of(models.MODELS[model]()), setup, "adam_mini")


@pytest.mark.parametrize("built", BUILT)
def check_built_in_other_ways(record: Record, built: str) -> None:
    difference = worst(trained(2)[built])
    record("DeepSpeed", f"from {built}", ["deepspeed", "torch"], ranks=2, ran="Llama, 10 clipped steps, fp32",
           result=f"weights within {difference:.1e} of one process")  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("case", FEW_BITS)
def check_few_bits(record: Record, case: str) -> None:
    """The codes are those of one process, except in blocks that two ranks share, a few to each tensor at most.

    With other random numbers, a third of all elements would be further apart after these steps.
    """
    answers = trained(2)[f"few bits {case}"]
    difference, share = worst(answers), max(one["share"] for one in answers)
    held = sum(one["state"]["exp_avg"] for one in answers) / answers[0]["parameters"]
    record(
        "DeepSpeed", f"ZeRO {case}", ["deepspeed", "torch"], ranks=2,
        ran=f"deepspeed.initialize as it stands; Llama of 0.27M parameters, {FEW_STEPS} clipped steps, fp32",
        result=f"first moment {held:.2f} bytes per parameter; weights within {difference:.1e} of one process, "
               f"{100 * (1 - share):.1f} % of them within 1e-4",
    )  # fmt: skip
    assert share <= 0.002 and difference <= 0.01
    assert held < {"int8": 1.1, "int4": 0.65}[FEW_BITS[case]["exp_avg_dtype"]]


@pytest.mark.parametrize("stage", [1, 2, 3])
def check_bf16(record: Record, stage: int) -> None:
    answers = trained(2)[f"bf16 {stage}"]
    difference = worst(answers)
    record("DeepSpeed", f"ZeRO {stage}, bf16", ["deepspeed", "torch"], ranks=2,
           ran=f"{answers[0]['wrapper']}; Llama, 10 clipped steps",
           result=f"fp32 weights within {difference:.1e} of one process with the same gradients")  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("move", ["1 to 3", "3 to 2"])
def check_whole_state(record: Record, move: str) -> None:
    difference = worst(trained(2)[f"whole state {move}"])
    record("DeepSpeed", f"whole state, ZeRO {move} and to one process", ["deepspeed", "torch"], ranks=2,
           ran="full_state_dict, load_full_state_dict; GPT-2, 5 + 5 steps",
           result=f"weights within {difference:.1e} of ten steps in one process")  # fmt: skip
    assert difference <= SAME


def check_the_host_optimizer_is_explained() -> None:
    for said in trained(2)["refused"]:
        assert "zero_force_ds_cpu_optimizer" in said and "set it to false" in said


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


@pytest.mark.parametrize(("model", "zero", "kind"), [("llama", {"stage": 1}, "model"), ("gpt2", {"stage": 2}, "model"),
                                                     ("gpt2", STAGE3, "names")])  # fmt: skip
def check_checkpoints(record: Record, folder: str, model: str, zero: dict[str, Any], kind: str) -> None:
    case = {"model": model, "zero": zero, "folder": folder, "kind": kind}
    where = "tests.interop.zero_checkpoints:"
    assert run(2, {"save": (f"{where}save", case)}, own_interpreters=True)["save"] == ["saved", "saved"]
    convert(folder)
    own = run(2, {"on": (f"{where}go_on", case | {"universal": False})}, own_interpreters=True)["on"]
    moved = [
        run(m, {"on": (f"{where}go_on", case | {"universal": True})}, own_interpreters=True)["on"] for m in (1, 2, 3)
    ]
    difference = max(worst(answers) for answers in (own, *moved))
    record("DeepSpeed", f"checkpoints, ZeRO {zero['stage']}", ["deepspeed", "torch"], ranks=2,
           ran=f"save_checkpoint, load_checkpoint; universal to 1, 2, 3 ranks; {model}, 5 + 5 steps",
           result=f"weights within {difference:.1e} of ten steps in one process")  # fmt: skip
    assert difference <= SAME
    assert all(one["kept as counted"] for answers in (own, *moved) for one in answers)


@pytest.mark.parametrize("stage", [2, 3])
def check_example(record: Record, stage: int) -> None:
    left = torchrun(2, "examples/deepspeed_zero.py", "--stage", str(stage))
    difference = apart(left["weights"], plain(2)["weights"])
    assert OPTIONS["lr"] == left["lr"]
    libraries = ["deepspeed", "torch", "transformers"]
    record("DeepSpeed", f"optimizer.integrations.deepspeed, ZeRO {stage}", libraries, ranks=2,
           ran="examples/deepspeed_zero.py: tiny Llama, 10 clipped steps, fp32",
           result=f"{falls(left['losses'])}; weights within {difference:.1e} of one process")  # fmt: skip
    assert difference <= SAME


@pytest.mark.parametrize("moment", ["int8", "int4"])
def check_example_of_few_bits(record: Record, moment: str) -> None:
    left = torchrun(2, "examples/deepspeed_offload.py", "--moment", moment)
    wanted = plain(2, optimizer=lambda model: AdamMini(model, **OPTIONS, exp_avg_dtype=moment))
    apart_by = max(abs(a - b) for a, b in zip(left["losses"], wanted["losses"], strict=True))
    record("DeepSpeed", f"ZeRO-Offload with an {moment} moment", ["deepspeed", "torch", "transformers"], ranks=2,
           ran="examples/deepspeed_offload.py: tiny Llama, 10 clipped steps, fp32, stage 2",
           result=f"{falls(left['losses'])}, within {apart_by:.1e} of one process; state of "
                  f"{left['held']:.2f} bytes per parameter")  # fmt: skip
    assert apart_by <= 0.005 and left["held"] < {"int8": 1.4, "int4": 0.9}[moment]
