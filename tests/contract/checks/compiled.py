"""torch.compile around the step: the same numbers, no break of the optimizer's own, no new graph when lr changes."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.contract.harness import LR, assert_close, check, give_gradients, named, random_steps, set_all, tensors
from tests.contract.subjects import Subject


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _run(
    subject: Subject, rates: list[float], tensor: bool = False, compiler: Any = None
) -> tuple[list[Any], int, list[int]]:
    """(parameters, breaks, graphs after each step) of a run whose step is compiled."""
    torch._dynamo.reset()
    counters.clear()
    pairs, backend = named(), Counting()
    lr = torch.tensor(rates[0]) if tensor else rates[0]
    optimizer = subject.make(pairs, lr=lr)
    step, graphs = torch.compile(optimizer.step, backend=compiler or backend), []
    for i, rate in enumerate(rates):
        lr.fill_(rate) if isinstance(lr, torch.Tensor) else set_all(optimizer, lr=rate)
        give_gradients(tensors(pairs), i)
        step()
        graphs.append(backend.graphs)
    breaks = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return tensors(pairs), breaks, graphs


def _expected(subject: Subject, rates: list[float]) -> list[Any]:
    """The parameters after the same run without a compiler."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR)
    for i, rate in enumerate(rates):
        set_all(optimizer, lr=rate)
        random_steps(optimizer, tensors(pairs), 1, start=i)
    return tensors(pairs)


RATES = [LR, LR / 2, LR / 4, LR / 8]


@check
def a_compiled_step_is_the_step(subject: Subject) -> None:
    """torch.compile(optimizer.step) gives the numbers of optimizer.step."""
    params, _, _ = _run(subject, [LR] * 3)
    assert_close(params, _expected(subject, [LR] * 3))


@check
def a_compiled_step_survives_functionalisation(subject: Subject) -> None:
    """aot_eager, the front half of the default compiler: every tensor that the step writes is known to be written."""
    params, _, _ = _run(subject, [LR] * 2, compiler="aot_eager")
    assert_close(params, _expected(subject, [LR] * 2))


@check
def a_compiled_step_is_one_graph(subject: Subject) -> None:
    """The step is compiled at the first call and not again, with no break but the one that torch puts in itself."""
    _, breaks, graphs = _run(subject, [LR] * 3)
    assert graphs[0] >= 1, "nothing was compiled"
    assert breaks <= 1, "the optimizer breaks the graph itself"
    assert graphs[-1] == graphs[0], "each step compiles anew"


@check(applies=lambda subject: subject.engine != "foreach")
def a_compiled_step_follows_a_tensor_rate(subject: Subject) -> None:
    """A Tensor lr changed between steps is followed without compiling again."""
    params, _, graphs = _run(subject, RATES, tensor=True)
    assert_close(params, _expected(subject, RATES))
    assert graphs[-1] == graphs[0]


@check
def a_compiled_step_follows_a_number(subject: Subject) -> None:
    """A float lr changed between steps is followed; the first change may compile once more, later ones never."""
    params, _, graphs = _run(subject, RATES)
    assert_close(params, _expected(subject, RATES))
    assert graphs[-1] == graphs[1]
