"""Check the simulator against collectives counted in real steps of small models on gloo ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from benchmarks.scaling.simulate import Message, fsdp1, fsdp2, zero3, zero12
from benchmarks.scaling.weights import Weight, weights_of
from optimizer.partition import Anatomy
from optimizer.tools.plan.sharding import tensor_parallel_axis

Counted = list[tuple[int, int]]
"""(ranks in the group, bytes) of every collective, sorted."""
FP32 = 4


class Checked(NamedTuple):
    """A small model of ``tests.sharding.models`` under a wrapper of ``tests.sharding.training``."""

    model: str
    wrap: str


SHARDED = (
    *(Checked(model, wrap) for model in ("llama", "gpt2", "mixtral") for wrap in ("fsdp2", "fsdp1", "fsdp1-flat")),
    Checked("llama-parallel", "tp"),
    Checked("llama-parallel", "tp-fsdp2"),
)
ZERO = tuple(Checked(model, f"zero{stage}") for model in ("llama", "gpt2", "mixtral") for stage in (1, 2, 3))
SUB_GROUP = 500
"""``sub_group_size`` in the checks of ZeRO-3, small enough that small models need several sub-groups."""


def cases(ranks: int, among: Iterable[Checked] = SHARDED) -> list[Checked]:
    """Return the cases that can run on this number of ranks."""
    return [case for case in among if case.wrap != "tp-fsdp2" or ranks % 2 == 0]


def expected(case: Checked, ranks: int) -> list[Counted]:
    """Return the collectives of every rank in a step, according to the simulator."""
    from tests.sharding.models import MODELS

    model = MODELS[case.model]()
    weights = weights_of(model, axis_of=partial(_axis, ranks if case.wrap == "tp" else 2))
    if case.wrap == "tp":
        return [_sorted(fsdp2(weights, 1, ranks, (0, rank))) for rank in range(ranks)]
    if case.wrap == "tp-fsdp2":
        return [_sorted(fsdp2(weights, ranks // 2, 2, (rank // 2, rank % 2))) for rank in range(ranks)]
    if case.wrap == "fsdp2":
        return [_sorted(fsdp2(weights, ranks, 1, (rank, 0))) for rank in range(ranks)]
    if case.wrap.startswith("fsdp1"):
        return [_sorted(fsdp1(_units(model, weights), ranks, case.wrap == "fsdp1"))] * ranks
    if case.wrap == "zero3":
        return [_sorted(zero3(weights, ranks, SUB_GROUP))] * ranks
    return [_sorted(zero12(weights, ranks))] * ranks


def _axis(tp: int, name: str, anatomy: Anatomy) -> int | None:
    """Return the axis that ``tests.sharding.training.tensor_parallel`` shards; None for weights that do not divide."""
    uneven = ("attention." in name and 6 % tp) or ("feed_forward" in name and 36 % tp)
    return None if uneven else tensor_parallel_axis(anatomy)


def _units(model: nn.Module, weights: Sequence[Weight]) -> list[list[Weight]]:
    """Group weights by the module that FSDP1 wraps: first those outside of blocks, then each block."""
    from tests.sharding.training import _blocks

    path = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and list(module) == _blocks(model)
    )
    count = len(_blocks(model))
    inside = [[w for w in weights if w.name.startswith(f"{path}.{i}.")] for i in range(count)]
    return [[w for w in weights if not w.name.startswith(f"{path}.")], *inside]


def _sorted(messages: Iterable[Message]) -> Counted:
    return sorted((message.ranks, message.numbers * FP32) for message in messages)


def counted(model: str, wrap: str) -> Counted:
    """Return the collectives of this rank's second step. Every rank of a gloo group calls this function."""
    import torch

    from tests.sharding.training import start

    if wrap.startswith("zero"):
        return _counted_zero(model, int(wrap.removeprefix("zero")))
    run = start(model, wrap, dtype=torch.float32)
    run.train(0, 1)
    run.messages.clear()
    run.train(1, 2)
    return sorted(run.messages)


def _counted_zero(model: str, stage: int) -> Counted:
    from tests.interop.zero import engine_of, train

    options: dict[str, Any] = {"stage": stage} | ({"sub_group_size": SUB_GROUP} if stage == 3 else {})
    engine, _ = engine_of(model, options)
    train(engine, 0, 1)
    messages: Counted = []
    train(engine, 1, 2, messages)
    return sorted(messages)


def differences(ranks: int, chosen: Sequence[Checked]) -> list[str]:
    """Run cases on a number of ranks and return a line for every case in which the simulator is wrong."""
    from tests.sharding.workers import run

    cases = {f"{c.model} {c.wrap}": ("benchmarks.scaling.check:counted", c._asdict()) for c in chosen}
    answers = run(ranks, cases, timeout=1800, own_interpreters=True)
    return [line for case in chosen if (line := difference(case, ranks, answers[f"{case.model} {case.wrap}"]))]


def difference(case: Checked, ranks: int, answers: Sequence[Any]) -> str:
    """Describe how the counted collectives differ from the simulator's; return "" if they are equal.

    Args:
        case: the case.
        ranks: number of ranks.
        answers: by rank, its ``Counted``, or the text of an error.
    """
    simulated = expected(case, ranks)
    wrong = [rank for rank in range(ranks) if answers[rank] != simulated[rank]]
    if not wrong:
        return ""
    return (
        f"{case.model} {case.wrap} on {ranks} ranks: rank {wrong[0]} counted {answers[wrong[0]]}, the simulator says "
        f"{simulated[wrong[0]]} ({len(wrong)} ranks differ)"
    )


def report(worlds: Sequence[int], zero: bool) -> int:
    """Print a line for each number of ranks; return the number of cases in which the simulator is wrong."""
    bad = 0
    for ranks in worlds:
        chosen = cases(ranks, ZERO if zero else SHARDED)
        wrong = differences(ranks, chosen)
        sent = [sum(nbytes for _, nbytes in expected(case, ranks)[0]) for case in chosen]
        sys.stdout.write(
            f"{ranks} ranks: {len(chosen) - len(wrong)} of {len(chosen)} cases as simulated, rank 0 sends "
            f"{min(sent)} to {max(sent)} bytes, {math.fsum(sent):.0f} in all\n"
        )
        sys.stdout.writelines(f"  {line}\n" for line in wrong)
        sys.stdout.flush()
        bad += len(wrong)
    return bad
