"""Loading first moments in eight and four bits, and the compensation of bf16 parameters."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini
from optimizer.state import first_moments as moment
from optimizer.step import moments as few_bits
from tests.optimizer.states import equal, refused


def wide(exp_avg_dtype: Any, seed: int = 0) -> tuple[nn.Parameter, AdamMini]:
    """One parameter large enough for codes, beside one that is not."""
    generator = torch.Generator().manual_seed(seed)
    large = nn.Parameter(torch.randn(64, 72, generator=generator))
    small = nn.Parameter(torch.randn(8, generator=generator))
    opt = AdamMini([("mlp.w1.weight", large), ("norm.weight", small)], exp_avg_dtype=exp_avg_dtype)
    return large, opt


def codes_of(p: nn.Parameter, kind: str) -> dict[str, torch.Tensor]:
    """Quantised state of a random first moment."""
    m = torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    codes, scale = few_bits.quantise(m, few_bits.FORMATS[kind], step=3, seed=0)
    v = torch.rand(64, 1, generator=torch.Generator().manual_seed(8))
    return {"step": torch.tensor(3.0), "exp_avg": codes, "exp_avg_scale": scale, "exp_avg_sq": v, "plain": m}


@pytest.mark.parametrize("piece", [1, 1 << 18])
@pytest.mark.parametrize("new", [None, torch.bfloat16, "int8", "int4"])
@pytest.mark.parametrize("old", [None, "int8", "int4"])
def test_first_moments_change_their_form_on_loading(old: Any, new: Any, piece: int, caplog, monkeypatch) -> None:
    """The same bits whatever the size of the pieces it is done in."""
    monkeypatch.setattr(moment, "_PIECE", piece)
    p, opt = wide(old)
    state = codes_of(p, old or "int8")
    exact = state.pop("plain")
    small = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}
    if old is None:
        state["exp_avg"] = exact
        del state["exp_avg_scale"]
    else:
        exact = few_bits.dequantise(state["exp_avg"], state["exp_avg_scale"], 72)
    document = {"state": {0: state, 1: small}, "param_groups": opt.state_dict()["param_groups"]}
    q, other = wide(new)
    with caplog.at_level(logging.INFO, "optimizer"):
        other.load_state_dict(document)
    got = other.state[q]
    if new in ("int8", "int4"):
        if old == new:
            assert equal(got, state) and not caplog.records
            return
        codes, scale = few_bits.quantise(exact, few_bits.FORMATS[new], step=3, seed=0)
        assert equal(got, {**state, "exp_avg": codes, "exp_avg_scale": scale})
        assert f"exp_avg quantised from {old or 'torch.float32'} to {new} (1x)" in caplog.text
    else:
        assert equal(got["exp_avg"], exact.to(new or torch.float32)) and "exp_avg_scale" not in got
        assert (f"exp_avg dequantised from {old} to" in caplog.text) == (old is not None)
    assert other.state[other.param_groups[0]["params"][1]]["exp_avg"].is_floating_point(), "small ones stay plain"


def test_scales_of_another_shape_are_refused() -> None:
    p, opt = wide("int8")
    state = codes_of(p, "int8")
    state["exp_avg_scale"] = state["exp_avg_scale"][:-1]
    del state["plain"]
    document = {"state": {0: state}, "param_groups": opt.state_dict()["param_groups"]}
    refused(wide(None)[1], document, r"exp_avg_scale of parameter 0 .*\(63, 1\).*needs \(64, 1\)")


def test_compensation_appears_where_wanted_and_goes_where_not(caplog) -> None:
    p = nn.Parameter(torch.randn(4, 6).bfloat16())
    state = {"step": 3, "exp_avg": torch.ones(4, 6).bfloat16(), "exp_avg_sq": torch.ones(4, 1)}
    with caplog.at_level(logging.INFO, "optimizer"):
        kahan = AdamMini([("wo.weight", p)], bf16_rounding="kahan")
        document = {"state": {0: state}, "param_groups": kahan.state_dict()["param_groups"]}
        kahan.load_state_dict(document)
        assert "compensation starts at zero" in caplog.text
        assert equal(kahan.state[p]["compensation"], torch.zeros(4, 6, dtype=torch.bfloat16))
        state["compensation"] = torch.full((4, 6), 0.5, dtype=torch.bfloat16)
        kahan.load_state_dict(document)
        assert equal(kahan.state[p]["compensation"], state["compensation"])
        assert kahan.state[p]["compensation"] is not state["compensation"]
        plain = AdamMini([("wo.weight", p)])
        plain.load_state_dict(document)
    assert "compensation dropped" in caplog.text and "compensation" not in plain.state[p]
