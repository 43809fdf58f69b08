"""Tensors of the model may be swapped for others: the optimizer holds nothing that forbids it to torch.

``torch.utils.swap_tensors`` refuses tensors with weak references, and those that C++ holds elsewhere. The tests of
``test_edited_groups`` put other parameters into the groups; here the parameters stay and their contents change.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from adam_mini import Adam_mini
from optimizer import AdamMini
from optimizer.wrappers.deepspeed import flats as deepspeed
from tests.optimizer.models import Llama, batch, loss_of, train

ENGINES: dict[str, dict[str, Any]] = {
    "native": {}, "eager": {"fused": False}, "foreach": {"foreach": True}, "kahan": {"bf16_rounding": "kahan"},
    "int8": {"exp_avg_dtype": "int8"},
}  # fmt: skip


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "make",
    [AdamMini, lambda m, **o: AdamMini(m.parameters(), **o), Adam_mini],
    ids=["model", "parameters", "Adam_mini"],
)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_converted_by_swapping(swapping: None, make: Callable[..., Any], steps: int, engine: str) -> None:
    model = Llama()
    optimizer = make(model, **({} if make is Adam_mini else ENGINES[engine]))
    train(model, optimizer, range(steps))
    model.to(torch.float64)
    assert all(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"])
    model.load_state_dict(model.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2))


@pytest.mark.parametrize("conversion", [nn.Module.bfloat16, nn.Module.double, nn.Module.cpu])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("engine", ["native", "eager", "foreach"])
def test_a_sharded_model_is_converted(
    one_rank: None, conversion: Callable[[nn.Module], nn.Module], steps: int, engine: str
) -> None:
    model = Llama()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = AdamMini(model, lr=0.1, **ENGINES[engine])
    train(model, optimizer, range(steps))
    conversion(model)
    optimizer.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():  # by hand: FSDP reduces in the dtype of its first forward pass
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    wanted = next(iter(model.parameters())).dtype
    assert all(optimizer.state[p]["exp_avg"].dtype == wanted for p in model.parameters())


def test_no_reference_to_a_parameter_but_those_of_torch() -> None:
    model = Llama()
    optimizer = AdamMini(model)
    train(model, optimizer, range(2))
    assert not any(weakref.getweakrefs(p) for p in model.parameters())
    gone = [weakref.ref(p) for p in model.parameters()]
    other = Llama()
    for group in optimizer.param_groups:
        group["params"] = [dict(other.named_parameters())[name] for name in group["param_names"]]
    optimizer.state.clear()
    del model
    train(other, optimizer, range(1))
    assert not any(ref() is not None for ref in gone), "what was replaced lives on in the optimizer"


# --- DeepSpeed, as far as its wrappers' attributes go ---------------------------------------------------------------


class Wrapper:
    """What DeepSpeed's BF16 optimizer keeps, and how it puts a flat tensor into each group."""

    def __init__(self, optimizer: AdamMini, names: dict[Tensor, str]) -> None:
        self.optimizer, self.param_names = optimizer, names
        self.bf16_groups = [list(group["params"]) for group in optimizer.param_groups]
        self.fp32_groups_flat_partition = [
            torch.cat([p.detach().flatten() for p in own]).requires_grad_() for own in self.bf16_groups
        ]
        self.real_dp_process_group = [dist.group.WORLD] * len(self.bf16_groups)
        for group, flat in zip(optimizer.param_groups, self.fp32_groups_flat_partition, strict=True):
            group["params"] = [flat]

    def step(self) -> None:
        for params, flat in zip(self.bf16_groups, self.fp32_groups_flat_partition, strict=True):
            flat.grad = torch.cat([p.grad.flatten() for p in params])  # type: ignore[union-attr]
        self.optimizer.step()
        for params, flat in zip(self.bf16_groups, self.fp32_groups_flat_partition, strict=True):
            at = 0
            for p in params:
                p.data.copy_(flat.detach()[at : at + p.numel()].view_as(p))
                at += p.numel()


@pytest.mark.parametrize(
    "make",
    [AdamMini, lambda m: AdamMini(list(m.named_parameters())), Adam_mini],
    ids=["model", "named list", "Adam_mini"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_flat_tensors_in_the_place_of_parameters(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, make: Callable[[nn.Module], AdamMini], swapped: bool
) -> None:
    """A stand-in with the attributes of DeepSpeed's BF16 optimizer: the weights of a plain run, flattened or not."""
    module = types.ModuleType(deepspeed._BASE)
    module.DeepSpeedOptimizer = Wrapper  # type: ignore[attr-defined]
    model, plain = Llama().double(), Llama().double()
    optimizer, beside = make(model), make(plain)
    if swapped:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.float().double()
            plain.float().double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    monkeypatch.setitem(sys.modules, deepspeed._BASE, module)
    wrapper = Wrapper(optimizer, {p: name for name, p in model.named_parameters()})
    for k in range(3):
        for one, stepped in ((model, wrapper), (plain, beside)):
            one.zero_grad()
            loss_of(one, batch(11, k)).backward()
            stepped.step()  # type: ignore[attr-defined]
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)
    sizes = [sum(layout.n_blocks for layout in own) for own in optimizer.layouts]
    assert sizes == [sum(layout.n_blocks for layout in own) for own in beside.layouts]
    stranger = torch.zeros(3, requires_grad=True)
    optimizer.param_groups[0]["params"] = [stranger]
    with pytest.raises(RuntimeError, match="that DeepSpeed did not make"):
        optimizer.step()
