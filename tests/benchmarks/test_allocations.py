"""Allocations of a step by kind, on a model whose tensors can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.allocations import KINDS, AllocationsByKind, moments_of, peak_resident, resident
from benchmarks.memory import allocations as allocated
from benchmarks.sft_memory_page import page
from optimizer import AdamMini

ROWS, WIDTH, VOCABULARY = 64, 128, 1000


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, VOCABULARY, bias=False))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamMini])
def test_kinds_add_up_to_what_torch_has_allocated(optimizer: type) -> None:
    net = model()
    adam = optimizer(net.parameters())
    x, y = torch.randn(ROWS, WIDTH), torch.randint(0, VOCABULARY, (ROWS,))

    def step(phase=lambda name: None) -> None:  # type: ignore[no-untyped-def]
        adam.zero_grad(set_to_none=True)
        phase("forward")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x).float(), y)
        phase("backward")
        loss.backward()
        phase("step")
        adam.step()

    step()
    adam.zero_grad(set_to_none=True)
    weights = sum(p.nbytes for p in net.parameters())
    held = weights + sum(moments_of(adam).values())
    with AllocationsByKind(net, adam, ROWS, VOCABULARY) as allocations:
        extra = allocated(lambda: step(allocations.begin)).peak
    found = allocations.result()
    kinds = found["kinds"]
    assert sum(kinds.values()) == found["followed"]
    assert kinds["parameters"] == weights
    assert kinds["first moment"] == weights and kinds["second moment"] == moments_of(adam)["second moment"]
    batch = x.nbytes + y.nbytes  # was there before, so only the followed tensors have it
    assert 0 <= held + extra + batch - found["followed"] < 0.3 * weights  # temporary tensors inside operations
    if found["phase"] == "backward":
        assert kinds["bf16 copies of weights"] > 0
    assert set(kinds) == set(KINDS)


def test_logits_and_activations_are_told_apart() -> None:
    net = model()
    with AllocationsByKind(net, AdamMini(net), ROWS, VOCABULARY) as allocations:
        allocations.begin("forward")
        logits = net(torch.randn(ROWS, WIDTH))
    kinds = allocations.result()["kinds"]
    assert kinds["logits"] == logits.nbytes
    assert kinds["activations"] == 2 * 4 * ROWS * WIDTH  # the input of each product; ReLU's output is the second one's


def test_state_of_another_optimizer_is_refused() -> None:
    net = model()
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(2, WIDTH)).sum().backward()
    sgd.step()
    with pytest.raises(RuntimeError, match="'momentum_buffer', which is neither"):
        moments_of(sgd)


def test_the_peak_of_resident_memory_is_that_of_the_block() -> None:
    with peak_resident() as peak:
        before = peak()
        block = torch.ones(32 << 20, dtype=torch.uint8)
        after = peak()
    assert after - before > 24 << 20
    assert resident() <= resident("VmHWM") and block.sum() > 0


def test_the_page_names_every_kind() -> None:
    kinds = dict.fromkeys(KINDS, 10**8)
    row = {"baseline": 0, "resident": 10**9, "files": 0, "allocated": 9 * 10**8, "followed": 8 * 10**8,
           "phase": "backward", "kinds": kinds, "held": {"first moment": 10**8, "second moment": 10**8}}  # fmt: skip
    plan = [{"devices": 2, "optimizer": name, "weights": 10**9} for name in ("AdamW, fp32 states", "adam_mini")]
    text = page({"rows": {"AdamW": row, "adam_mini": row}, "plan": plan, "machine": {"torch": "2"},
                 "rows_of_batch": 4, "length": 256,
                 "plan_options": {"micro_batch": 1, "sequence": 2, "vocabulary": 3}})  # fmt: skip
    assert all(kind in text for kind in (*KINDS, "inside operations", "heap and files"))
