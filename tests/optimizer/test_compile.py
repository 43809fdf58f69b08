"""torch.compile of the step: no break, no recompilation when a number changes, the same parameters as without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from adam_mini import Adam_mini
from optimizer import AdamMini

OPTIONS: list[dict[str, Any]] = [{}, {"fused": False}, {"foreach": True}, {"fused": True}]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 7))


def train(compiled: bool, backend: Any, make: Any = AdamMini, **options: Any) -> list[Tensor]:
    net = model()
    optimizer = make(net, lr=options.pop("lr", 0.01), weight_decay=0.1, **options)
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if compiled else optimizer.step
    for k in range(5):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        step()
        for group in optimizer.param_groups:  # as a schedule and OneCycleLR do
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.01 / (k + 2))
            else:
                group["lr"] = 0.01 / (k + 2)
            group["betas"] = (0.9 - 0.01 * k, 0.999)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lr", [0.01, "tensor"])
def test_one_graph_and_no_break_whatever_changes(options: dict[str, Any], lr: Any) -> None:
    def rate() -> Any:
        return torch.tensor(0.01) if lr == "tensor" else lr

    if options.get("foreach") and lr == "tensor":
        return  # refused, as in torch
    backend = Counting()
    compiled = train(True, backend, lr=rate(), **options)
    assert backend.graphs == 1 and not counters["graph_break"]
    for p, q in zip(compiled, train(False, None, lr=rate(), **options), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_inductor_and_the_published_door() -> None:
    for make in (AdamMini, Adam_mini):
        for p, q in zip(train(True, "inductor", make), train(False, None, make), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        torch._dynamo.reset()


def test_two_optimizers_read_their_own_numbers() -> None:
    import copy

    net = model()
    optimizer = AdamMini(net, lr=0.01)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.compile(optimizer.step, backend="eager")()
    other_net, other = copy.deepcopy((net, optimizer))
    for group in other.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in other_net.parameters()]
    torch.compile(other.step, backend="eager")()
    assert all(torch.equal(p, q) for p, q in zip(other_net.parameters(), before, strict=True))


def test_a_gradient_that_cannot_be_stepped_is_refused_inside_a_graph_too() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamMini(embedding, lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(Exception, match="sparse"):
        torch.compile(optimizer.step, backend="eager")()


def test_the_operator_says_what_it_changes() -> None:
    net = model()
    optimizer = AdamMini(net)
    optimizer.init_state()
    group = optimizer.param_groups[0]
    states = [optimizer.state[p][name] for p in group["params"] for name in sorted(optimizer.state[p])]
    grads = [torch.ones_like(p) for p in group["params"]]
    torch.library.opcheck(
        torch.ops.adam_mini.step_.default,
        (list(group["params"]), grads, states, optimizer._number, 0, list(range(len(grads)))),
    )


def test_every_optimizer_of_a_process_can_be_compiled() -> None:
    """A compiler takes numbers that differ between two optimizers for variables; ours must not be any."""
    for width in (8, 8, 5):
        backend, net = Counting(), nn.Linear(4, width)
        optimizer = AdamMini(net, lr=0.1)
        before = net.weight.detach().clone()
        for k in range(3):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            torch.compile(optimizer.step, backend=backend, fullgraph=True)()
        assert backend.graphs == 1 and not torch.equal(net.weight, before)
