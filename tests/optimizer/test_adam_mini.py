"""The optimizer class: AdamW in the limit, torch's contract where this project promises it, bad input by name."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from optimizer import AdamMini, Layout, Rules, partition
from tests.optimizer.models import GPT, Llama, batch, loss_of, train
from tests.optimizer.references import reference_of


def test_elementwise_is_adamw() -> None:
    ours, theirs = Llama(), Llama()
    train(ours, AdamMini(ours.parameters(), lr=3e-3, weight_decay=0.1, rules="elementwise"), range(50))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1), range(50))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_sharing_has_an_effect() -> None:
    ours, theirs = Llama(), Llama()
    train(ours, AdamMini(ours.parameters(), lr=3e-3), range(5))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3), range(5))
    assert max((p - q).abs().max() for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize(
    "rules", ["adam_mini", "adam_mini_v1_0", "short_run", "pytorch_default", "slim_adam", "factored"]
)
@pytest.mark.parametrize("make", [lambda: Llama(n_heads=6, n_kv_heads=2, head_dim=5), GPT])
def test_whole_models_follow_the_reference(rules: str, make) -> None:
    model = make().double()
    layouts = partition(model, rules)
    optimizer = AdamMini(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, rules=rules)
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    references = {n: reference_of(p.detach(), layouts[n]) for n, p in model.named_parameters()}
    expected = {}
    for step in range(4):
        loss_of(model, batch(11, step)).backward()
        for n, p in model.named_parameters():
            options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": decay[n]}
            expected[n] = references[n].step(p.grad, **options)
        optimizer.step()
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, expected[n], rtol=1e-12, atol=1e-12, msg=n)


def test_a_model_makes_two_groups() -> None:
    optimizer = AdamMini(GPT(), weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    decaying, rest = (set(g["param_names"]) for g in optimizer.param_groups)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} <= decaying
    assert {"transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.bias"} <= rest


def test_callers_groups_stay_the_callers() -> None:
    model = Llama()
    attention = list(model.layers[0].attention.parameters())
    others = [p for p in model.parameters() if not any(p is q for q in attention)]
    optimizer = AdamMini([{"params": attention, "lr": 1e-2}, {"params": others}], lr=1e-3, weight_decay=0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.3]
    assert len(AdamMini(model.named_parameters(), weight_decay=0.3).param_groups) == 1


def test_add_param_group_and_schedulers() -> None:
    model, more = Llama(), nn.Linear(3, 4)
    optimizer = AdamMini(model, lr=1e-3)
    optimizer.add_param_group({"params": list(more.named_parameters()), "lr": 0.5})
    assert [layout.n_blocks for layout in optimizer.layouts[-1]] == [1, 4]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(model, optimizer, range(2))
    schedule.step()


def test_closure_and_tensor_lr() -> None:
    model, other = Llama(), Llama()
    tensor, number = AdamMini(model, lr=torch.tensor(1e-2)), AdamMini(other, lr=1e-2)
    for m, optimizer in ((model, tensor), (other, number)):

        def closure(m: nn.Module = m, optimizer: AdamMini = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(m, batch(11, 0))
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_state_bytes_of_a_ten_million_llama() -> None:
    with torch.device("meta"):
        model = Llama(vocab=8192, dim=320, layers=4, n_heads=5, n_kv_heads=5, hidden=864)
    n = sum(p.numel() for p in model.parameters())
    assert 8e6 < n < 13e6
    held = AdamMini(model).state_bytes()
    assert sum(held.values()) / n <= 4.05
    assert held["exp_avg"] == 4 * n


def test_state_bytes_are_what_is_held() -> None:
    model = GPT()
    optimizer = AdamMini(model)
    train(model, optimizer, range(1))
    held = dict.fromkeys(("exp_avg", "exp_avg_sq", "step"), 0)
    for state in optimizer.state.values():
        assert set(state) == set(held)
        for key, value in state.items():
            held[key] += value.numel() * value.element_size()
    assert optimizer.state_bytes() == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_and_keeps_dtypes(dtype: torch.dtype) -> None:
    model = Llama().to(dtype)
    optimizer = AdamMini(model, lr=1e-2)
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = Llama(seed=1).to(dtype)
    again.load_state_dict(saved["model"])
    resumed = AdamMini(again, lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    assert all(state["exp_avg_sq"].dtype is torch.float32 for state in resumed.state.values())
    given = [s["exp_avg_sq"].data_ptr() for s in saved["optimizer"]["state"].values()]
    assert not set(given) & {s["exp_avg_sq"].data_ptr() for s in resumed.state.values()}, "the caller's tensors live on"
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_adamw_checkpoints_continue_under_elementwise() -> None:
    a, b = Llama(), Llama()
    adamw = torch.optim.AdamW(a.parameters(), lr=1e-2)
    train(a, adamw, range(3))
    b.load_state_dict(a.state_dict())
    ours = AdamMini(b.parameters(), rules="elementwise")
    ours.load_state_dict(adamw.state_dict())
    train(a, adamw, range(3, 6))
    train(b, ours, range(3, 6))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_state_of_another_partition_is_refused_before_anything_moves() -> None:
    model = Llama()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(1))
    optimizer = AdamMini(model.parameters())
    with pytest.raises(ValueError, match=r"exp_avg_sq.*\(11, 16\).*\(11, 1\)"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.state


def test_copies_and_pickles() -> None:
    model = Llama()
    optimizer = AdamMini(model, lr=1e-2)
    train(model, optimizer, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin_model, twin, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"), ({"lr": math.inf}, "lr=inf"),
        ({"eps": -1e-8}, "eps=-1e-08"), ({"eps": math.nan}, "eps=nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"), ({"betas": (0.9, math.nan)}, r"betas\[1\]=nan"),
        ({"betas": 0.9}, "betas=0.9"), ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": math.inf}, "weight_decay=inf"), ({"rules": "adam_minni"}, "adam_minni"),
    ],
)  # fmt: skip
def test_bad_arguments_are_quoted(options: dict, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        AdamMini(nn.Linear(2, 2), **options)


def test_bad_gradients_are_refused_before_anything_moves() -> None:
    first, embedding = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    optimizer = AdamMini([*first.parameters(), *embedding.parameters()], lr=0.1)
    first(embedding(torch.tensor([1, 2]))).sum().backward()
    before = first.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(first.weight, before) and not optimizer.state
    with pytest.raises(ValueError, match="no trainable"):
        AdamMini(nn.ReLU())


def test_a_parameter_that_changed_shape_is_named() -> None:
    layer = nn.Linear(3, 4)
    optimizer = AdamMini(layer)
    layer.weight.data = torch.zeros(7, 3)
    layer.weight.grad = torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"weight.*\(7, 3\)"):
        optimizer.step()


def test_odd_parameters() -> None:
    """Zero-size, 0-dim, and late gradients."""
    empty, scalar, late = (nn.Parameter(torch.ones(s)) for s in ((0, 3), (), (2, 2)))
    optimizer = AdamMini([empty, scalar, late], lr=0.1)
    empty.grad, scalar.grad = torch.zeros(0, 3), torch.tensor(2.0)
    optimizer.step()
    torch.testing.assert_close(scalar.detach(), torch.tensor(0.9))
    late.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.state[late]["step"] == 1 and optimizer.state[scalar]["step"] == 2


def test_rules_object_and_custom_units() -> None:
    rules = Rules("mine", {"MLP_IN": "IN_NEURON"})
    optimizer = AdamMini(nn.Sequential(nn.Linear(3, 4)), rules=rules)
    assert optimizer.layouts[0][0] == Layout(1, [1, 1, 1])
