"""Steps of DTensors and flat parameters on one rank: compiled, skipped, of scalars, of whole factored tensors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from optimizer import AdamMini
from optimizer.partition import FactoredLayout
from optimizer.sharding.cut_rounded import Rounds
from optimizer.sharding.cut_update import cut_update
from optimizer.sharding.exchange import Means
from optimizer.step.engines import dispatch, seed_of

ENGINES = [{}, {"fused": False}, {"foreach": True}, {"fused": True}]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("options", ENGINES, ids=str)
@pytest.mark.parametrize("skipped", [True, False])
def test_found_inf_stops_a_compiled_step_of_fsdp2(one_rank: None, options: dict[str, bool], skipped: bool) -> None:
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 8))
    optimizer = AdamMini(model, lr=0.1, **options)
    optimizer.found_inf = torch.full((), float(skipped))  # what GradScaler leaves for a fused optimizer
    step = torch.compile(optimizer.step, backend="eager")
    model(torch.ones(3, 8)).sum().backward()
    before = [p.detach().full_tensor().clone() for p in model.parameters()]
    step()
    after = [p.detach().full_tensor() for p in model.parameters()]
    assert all(torch.equal(a, b) is skipped for a, b in zip(before, after, strict=True))


def test_found_inf_on_a_device_stops_what_no_engine_takes(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the optimizer asks before it begins; elsewhere everything that steps has to ask for itself.

    The bias was joined with a weight that decays, so no engine takes it: it is the end of the one flat parameter.
    """
    torch.manual_seed(0)
    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(8, 8)), device_id=torch.device("cpu"))
    optimizer = AdamMini(model, lr=0.1)
    monkeypatch.setattr(optimizer, "skips", lambda: False)
    for skipped in (True, False):
        optimizer.found_inf = torch.full((), float(skipped))
        model(torch.ones(3, 8)).sum().backward()
        (flat,) = model.parameters()
        before = flat.detach()[-8:].clone()
        optimizer.step()
        assert torch.equal(flat[-8:], before) is skipped


def test_a_replicated_scalar_is_stepped(one_rank: None) -> None:
    """A parameter without axes that is a DTensor: a learned temperature that tensor parallelism replicates."""
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(distribute_tensor(torch.tensor(1.0), mesh, [Replicate()]))
    plain = nn.Parameter(torch.tensor(1.0))
    for p, grad in ((parameter, distribute_tensor(torch.tensor(0.5), mesh, [Replicate()])), (plain, torch.tensor(0.5))):
        p.grad = grad
        AdamMini([("temperature", p)], lr=0.1).step()
    assert torch.equal(parameter.full_tensor(), plain)


class Convolved(nn.Module):
    """A fused projection, a matrix, and a convolution whose rows of a quantised moment span several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 2, bias=False)
        self.convolution = nn.Conv2d(16, 64, 8, bias=False)

    def forward(self) -> torch.Tensor:
        weights = (self.attention.in_proj_weight, self.attention.out_proj.weight, self.convolution.weight)
        return sum((w.sin() * (1 + i)).square().sum() for i, w in enumerate(weights))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"exp_avg_dtype": "int8"}, {"exp_avg_dtype": "int4"}], ids=str
)
def test_engines_step_whole_factored_tensors_of_a_flat_one(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """They take the tensors as if nothing was flattened, so the results have the bits of the unsharded model."""
    torch.manual_seed(0)
    plain, copy = Convolved(), Convolved()
    copy.load_state_dict(plain.state_dict())
    flat = FullyShardedDataParallel(copy, device_id=torch.device("cpu"))
    taken: list[tuple[int, ...]] = []
    run = dispatch.run

    def spying(items: Any, *others: Any) -> Any:
        taken.extend(tuple(item.param.shape) for item in items)
        return run(items, *others)

    optimizers = [AdamMini(model, lr=0.01, rules="factored", **options) for model in (plain, flat)]
    shapes = [tuple(p.shape) for p in plain.parameters()]
    for step in range(3):
        for model, optimizer in zip((plain, flat), optimizers, strict=True):
            model().backward()
            with monkeypatch.context() as patched:
                patched.setattr(dispatch, "run", spying)
                taken.clear()
                optimizer.step()
            assert step or sorted(taken) == sorted(shapes)
            optimizer.zero_grad()
    (joined,) = flat.parameters()
    parts = joined.detach()[: sum(map(prod, shapes))].split([prod(shape) for shape in shapes])
    for p, part in zip(plain.parameters(), parts, strict=True):
        assert torch.equal(p, part.view(p.shape))
    assert optimizers[0].state_bytes()["exp_avg_sq"] == optimizers[1].state_bytes()["exp_avg_sq"]


@pytest.mark.parametrize("replicated", [False, True])
def test_engines_step_whole_factored_dtensors(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, replicated: bool
) -> None:
    """A DTensor that is whole on this rank, sharded over one rank or replicated, is an ordinary tensor to engines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False))
    if replicated:
        weight = distribute_tensor(model[0].weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
        model[0].weight = nn.Parameter(weight)
    else:
        fully_shard(model)
    (parameter,) = model.parameters()
    parameter.grad = torch.ones_like(parameter)
    layouts: list[Any] = []
    run = dispatch.run

    def spying(items: Any, *others: Any) -> Any:
        layouts.extend(item.layout for item in items)
        return run(items, *others)

    monkeypatch.setattr(dispatch, "run", spying)
    AdamMini(model, rules="factored").step()
    assert layouts == [FactoredLayout((16, 8), 0)]


def test_a_flat_factored_state_is_saved_and_loaded(one_rank: None) -> None:
    """It is saved by element. Loading makes means of rows and of columns again, also those of whole tensors."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(Convolved(), device_id=torch.device("cpu"))
    (parameter,) = model.parameters()
    saving, loading = (AdamMini(model, lr=0.01, rules="factored") for _ in range(2))
    model().backward()
    saving.step()
    loading.load_state_dict(saving.state_dict())
    for name, values in saving.state[parameter].items():
        torch.testing.assert_close(loading.state[parameter][name], values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_whole_factored_tensors_of_few_bits_are_stepped_where_only_another_rank_has_a_gradient(
    one_rank: None, format: str
) -> None:
    """No engine steps them then. The step is that of the unsharded model with gradients of zeros."""
    torch.manual_seed(0)
    plain, copy = Convolved(), Convolved()
    copy.load_state_dict(plain.state_dict())
    flat = FullyShardedDataParallel(copy, device_id=torch.device("cpu"))
    options: dict[str, Any] = {"lr": 0.01, "rules": "factored", "exp_avg_dtype": format, "fused": False}
    optimizers = [AdamMini(model, **options) for model in (plain, flat)]
    for model, optimizer in zip((plain, flat), optimizers, strict=True):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in plain.parameters():
        p.grad = torch.zeros_like(p)
    optimizers[0].step()
    (joined,) = flat.parameters()
    shard, state = optimizers[1].shard_of(0, 0), optimizers[1].state[joined]
    assert shard is not None and shard.geometry.cut is not None and shard.flat is not None
    zeros = Means(torch.zeros(len(shard.geometry.cut.blocks.counts)), torch.zeros_like(state["exp_avg_sq_col"]))
    rounds = Rounds(seed_of(0, 0), None, flat=shard.flat, seeds=[seed_of(0, i) for i in range(3)])
    numbers = optimizers[1].numbers(optimizers[1].param_groups[0]).numbers()
    cut_update(shard.geometry, shard.view, None, shard.local_state(state), zeros, rounds, step=2, **numbers)
    parts = joined.detach().split([p.numel() for p in plain.parameters()])
    for p, part in zip(plain.parameters(), parts, strict=True):
        torch.testing.assert_close(p.detach(), part.view(p.shape), rtol=1e-6, atol=1e-7)
