"""Steps of DTensors and flat parameters on one rank: compiled, skipped by a GradScaler, and of scalars."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from optimizer import AdamMini

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
