"""Factored second moments: the layouts, every engine against the reference, and conversions to and from other rules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from optimizer import AdamMini, Rules, partition
from optimizer.memory import gradient_release
from optimizer.partition import FactoredLayout, Role, Unit
from optimizer.step.engines.traced import traced_update
from optimizer.step.factored import factored_update
from optimizer.step.hyper import Hyper
from optimizer.tools.explain.render import explanation_json
from optimizer.tools.explain.rows import explanation
from tests.fuzz.draw import strided
from tests.optimizer.factored_steps import Reference, state_of
from tests.optimizer.strategies import factored_layouts

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@settings(max_examples=80, deadline=None)
@given(factored_layouts(), st.integers(0, 10_000), st.sampled_from(["plain", "transposed", "gapped"]), st.booleans())
@example((FactoredLayout((4, 5), 1, [(0, 2), (1, 3)], leading=1), (4, 5)), 0, "plain", False)  # no axis of columns
def test_equals_the_reference_in_float64(pair, seed: int, how: str, maximize: bool) -> None:
    layout, shape = pair
    options = {**HYPER, "maximize": maximize}
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference, traced = Reference(p, layout), p.clone()
    eager_state, traced_state = state_of(p, layout), state_of(p, layout)
    first, second, columns = (eager_state[k] for k in ("exp_avg", "exp_avg_sq", "exp_avg_sq_col"))
    for step in range(1, 4):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        given_g = strided(g, how)
        factored_update(p, given_g, first, second, columns, layout, step=step, **options)
        traced_update(
            traced,
            given_g,
            traced_state["exp_avg"],
            traced_state["exp_avg_sq"],
            traced_state["step"],
            layout,
            Hyper(**options),
            exp_avg_sq_col=traced_state["exp_avg_sq_col"],
        )
        expected = reference.step(g, **options)
        assert torch.equal(given_g, g), "the gradient was touched"
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(traced, expected, rtol=1e-12, atol=1e-12)
    assert layout.n_blocks == second.numel() + columns.numel()
    assert sum(s.r.numel() + s.c.numel() for s in reference.states) == layout.n_blocks


def test_a_rank_one_gradient_gives_adam_s_step() -> None:
    """If g**2 is an outer product at every step with the same factors, so is Adam's v, and the steps are equal."""
    torch.manual_seed(0)
    a, b = torch.rand(7, 1, dtype=torch.float64) + 0.1, torch.rand(1, 5, dtype=torch.float64) + 0.1
    layout = FactoredLayout((7, 5), 0)
    p = torch.randn(7, 5, dtype=torch.float64)
    adam = nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([adam], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    state = state_of(p, layout)
    for step in range(1, 6):
        g = a * b * torch.randn((), dtype=torch.float64) * torch.randn(7, 5).sign()
        columns = state["exp_avg_sq_col"]
        factored_update(p, g, state["exp_avg"], state["exp_avg_sq"], columns, layout, step=step, **HYPER)
        adam.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(p, adam.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_and_columns_stay_where_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False, dtype=dtype)
    # The default lr is less than half the distance of two large bf16 weights.
    optimizer = AdamMini([("weight", model.weight)], lr=0.1, rules="factored")
    before = model.weight.detach().clone()
    for _ in range(3):
        g = torch.randn(4, 6).to(dtype)
        g[1], g[:, 2] = 0, 0
        model.weight.grad = g
        optimizer.step()
    moved = model.weight.detach() != before
    assert not moved[1].any() and not moved[:, 2].any() and moved[0, 0]
    model.weight.grad = torch.zeros(4, 6, dtype=dtype)
    fresh = AdamMini([("weight", model.weight)], rules="factored")
    before = model.weight.detach().clone()
    fresh.step()
    assert torch.equal(model.weight.detach(), before)


@pytest.mark.parametrize("options", [{}, {"fused": False}])
def test_one_infinite_gradient_moves_no_finite_element_and_large_ones_do_not_overflow(options: dict) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = AdamMini([("weight", weight)], lr=0.1, rules="factored", **options)
    before = weight.detach().clone()
    weight.grad = torch.randn(4, 6)
    weight.grad[2, 3] = torch.inf
    weight.grad[1] = 0  # the root of its row mean, 0, times an infinite root would be NaN
    optimizer.step()
    others = torch.ones(4, 6, dtype=torch.bool)
    others[2, 3] = False
    assert torch.equal(weight.detach()[others], before[others]) and not weight[2, 3].isfinite()
    # The squares fit into fp32; the product of a row mean and a column mean does not.
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = AdamMini([("weight", weight)], lr=0.1, rules="factored", **options)
    weight.grad = torch.full((4, 6), 1e18)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), -0.1))


def test_what_factored_means_for_every_kind_of_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.conv = nn.Conv2d(3, 5, 2)
            self.row, self.column = nn.Linear(6, 1), nn.Linear(1, 6)
            self.norm = nn.LayerNorm(4)
            self.attention = nn.MultiheadAttention(8, 2)

    layouts = partition(Model(), "factored")
    assert layouts["linear.weight"].n_blocks == 10 and layouts["linear.bias"].n_blocks == 4
    assert layouts["conv.weight"].n_blocks == 5 + 3 * 2 * 2
    assert layouts["row.weight"].n_blocks == 6 and "single row or column" in layouts["row.weight"].note
    assert layouts["column.weight"].n_blocks == 6 and layouts["norm.weight"].n_blocks == 1
    fused = layouts["attention.in_proj_weight"]
    assert isinstance(fused, FactoredLayout) and fused.parts == 3 and fused.n_blocks == 24 + 3 * 8
    mixed = partition(Model(), Rules("factored").replace("mixed", {"VALUE": "OUT_NEURON"}))["attention.in_proj_weight"]
    assert mixed == fused and "VALUE asks for OUT_NEURON" in mixed.note
    finest = partition(Model(), Rules("adam_mini").replace("mixed", {"KEY": "ELEMENT"}))["attention.in_proj_weight"]
    assert finest.n_blocks == 24 * 8 and "one scalar per element like its other parts: QUERY asks" in finest.note
    overridden = partition(Model(), Rules("adam_mini").override({"linear.weight": Unit.FACTORED}))
    assert overridden["linear.weight"] == layouts["linear.weight"]


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": False}, {"exp_avg_dtype": "int8"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_runs_and_descends(how: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 90, dtype=dtype), nn.Tanh(), nn.Linear(90, 3, dtype=dtype))
    twin = copy.deepcopy(model)
    x, y = torch.randn(64, 70, dtype=dtype), torch.randint(0, 3, (64,))
    losses = []
    for net, options in ((model, how), (twin, {})):
        optimizer = AdamMini(net, lr=3e-3, rules="factored", **options)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x).float(), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.5 and losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.parametrize("other", ["adam_mini", "slim_adam", "derived", "elementwise", "pytorch_default"])
def test_checkpoints_convert_to_and_from_every_kind_of_rules(other: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)

    def trained(rules: str) -> AdamMini:
        optimizer = AdamMini(model, rules=rules)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return optimizer

    there, factored = trained(other), trained("factored")
    for source, target in ((there, factored), (factored, there)):
        document, fresh = source.state_dict(), AdamMini(model, rules=target.rules)
        with pytest.raises(ValueError, match="convert=True"):
            fresh.load_state_dict(document)
        fresh.load_state_dict(document, convert=True)
        for p in model.parameters():
            assert {k: v.shape for k, v in fresh.state[p].items()} == {k: v.shape for k, v in target.state[p].items()}
    # Means of rows and columns are exact from one value per element.
    if other == "elementwise":
        v = there.state[model.in_proj_weight]["exp_avg_sq"]
        fresh = AdamMini(model, rules="factored")
        fresh.load_state_dict(there.state_dict(), convert=True)
        state = fresh.state[model.in_proj_weight]
        torch.testing.assert_close(state["exp_avg_sq"], v.mean(1, keepdim=True))
        torch.testing.assert_close(state["exp_avg_sq_col"], v.unflatten(0, (3, 8)).mean(1))


def _stepped(how: str) -> dict[str, torch.Tensor]:
    """Parameters of a small model after three steps, taken in one of the ways that users take them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5))
    optimizer = AdamMini(model, lr=1e-2, rules="factored")
    if how == "release":
        gradient_release(optimizer)
    step = torch.compile(optimizer.step) if how == "compiled" else optimizer.step
    for _ in range(3):
        model(torch.ones(2, 7)).square().sum().backward()
        step()
        optimizer.zero_grad()
        if how == "pickled":
            fresh = AdamMini(model, lr=1e-2, rules="factored")
            fresh.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
            optimizer = fresh
            step = optimizer.step
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["release", "compiled", "pickled"])
def test_every_way_of_stepping_gives_the_same(how: str) -> None:
    expected = _stepped("plain")
    for name, p in _stepped(how).items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)


def test_a_factored_checkpoint_gives_the_values_of_its_product() -> None:
    """One value per element is r c / mean(r) of the element's part; one value per row is r, without error."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    source = AdamMini(model, rules="factored")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    source.step()
    r, c = (source.state[model.in_proj_weight][name] for name in ("exp_avg_sq", "exp_avg_sq_col"))
    parts = zip(r.split(8), c, strict=True)
    expected = torch.cat([rows * columns / rows.mean() for rows, columns in parts])
    for rules, wanted in ((Rules("elementwise"), expected), (Rules("rows", dict.fromkeys(Role, "OUT_NEURON")), r)):
        target = AdamMini(model, rules=rules)
        target.load_state_dict(source.state_dict(), convert=True)
        got = target.state[model.in_proj_weight]["exp_avg_sq"]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_explain_counts_what_is_stored() -> None:
    model = nn.MultiheadAttention(8, 2)
    whole = explanation(model, "factored")
    assert whole.totals.exp_avg_sq_bytes == AdamMini(model, rules="factored").state_bytes()["exp_avg_sq"]
    rows = {row["name"]: row for row in explanation_json(whole)["parameters"]}
    segments = [[0, 8], [1, 8], [2, 8]]
    assert rows["in_proj_weight"]["factored"] == {"segments": segments, "repeat": 1, "parts": 3, "columns": 8}
    assert rows["in_proj_bias"]["factored"] is None
