"""The dense Hessian against torch's own, on every style of model, any subset of parameters and ragged batches.

``torch.func.hessian`` in torch 2.13 drops terms in the rows of LayerNorm weights (its result is not symmetric there):
those rows are compared with double backward, and everything else with both.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessian.operators
from experiments.models import lm_loss
from hessian import HessianOperator, MatrixOperator, dense
from tests.hessian.subjects import batches_for, double_backward, functional_hessian, gpt, joined, llama, mlp

EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "plain"])
@pytest.mark.parametrize("make", [gpt, llama, mlp])
def test_dense_is_the_hessian(make, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.operators, "LINEARISE_AFTER", 0 if traced else 10**9)
    model = make()
    params, batches = dict(model.named_parameters()), batches_for(model)
    operator = HessianOperator(model, lm_loss, params, batches)
    found = dense(operator, chunk=50)
    if traced and make is not mlp:
        assert operator._programs, "the traced path was not taken"
    torch.testing.assert_close(found, double_backward(model, joined(batches), params), **EXACT)
    reference = functional_hessian(model, joined(batches), params)
    trusted = torch.cat([torch.full((p.numel(),), "ln_" not in name or "bias" in name) for name, p in params.items()])
    torch.testing.assert_close(found[trusted], reference[trusted], **EXACT)


def test_torch_func_hessian_is_not_symmetric_for_layer_norm() -> None:
    """The reason for the exception above; when torch mends it, this test says so and the exception can go."""
    model = gpt()
    params, batch = dict(model.named_parameters()), joined(batches_for(model))
    reference = functional_hessian(model, batch, params)
    ours = dense(HessianOperator(model, lm_loss, params, [batch]))
    assert (ours - ours.T).abs().max() < 1e-12 < (reference - reference.T).abs().max()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (gpt, ["transformer.h.0.attn.c_attn.weight"]),
        (gpt, ["lm_head.weight", "transformer.wte.weight"]),  # another order than the model's
        (llama, ["layers.0.attention.wq.weight", "layers.0.attention.wk.weight"]),
        (mlp, ["fc2.bias"]),
    ],
)
def test_any_subset(make, names: list[str]) -> None:
    model = make()
    known = dict(model.named_parameters())
    params, batches = {name: known[name] for name in names}, batches_for(model)
    found = dense(HessianOperator(model, lm_loss, params, batches))
    torch.testing.assert_close(found, functional_hessian(model, joined(batches), params), **EXACT)


def test_tied_weights_count_once() -> None:
    model = gpt(tied=True)
    params, batches = dict(model.named_parameters()), batches_for(model)
    assert "lm_head.weight" not in params
    found = dense(HessianOperator(model, lm_loss, params, batches))
    torch.testing.assert_close(found, double_backward(model, joined(batches), params), **EXACT)


def pooled_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]).mean((1, 2)), batch[1])


def test_torch_transformer_layer_and_attention() -> None:
    """eval mode takes a fused path that has no derivative at all; the operator must step around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)).double().eval()
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(3, 4, 4, generator=generator).double(), torch.randn(3, generator=generator).double())
    params = dict(model.named_parameters())
    fast = torch.backends.mha.get_fastpath_enabled()
    found = dense(HessianOperator(model, pooled_loss, params, [batch]))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    torch.testing.assert_close(found, double_backward(model, batch, params, pooled_loss), **EXACT)


def test_float32() -> None:
    model = llama()
    exact = dense(HessianOperator(model, lm_loss, None, batches_for(model)))
    single = dense(HessianOperator(model.float(), lm_loss, None, batches_for(model)))
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_progress_and_chunks() -> None:
    matrix = torch.arange(49.0).reshape(7, 7)
    matrix = matrix + matrix.T
    calls: list[tuple[int, int]] = []
    assert torch.equal(dense(MatrixOperator(matrix), chunk=3, progress=lambda d, t: calls.append((d, t))), matrix)
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_too_large_is_refused_with_the_bytes_and_the_way_out() -> None:
    model = llama()
    operator = HessianOperator(model, lm_loss, None, batches_for(model))
    n = operator.shape[0]
    with pytest.raises(ValueError, match=rf"{8 * n * n:,} bytes.*slq.*block_norms"):
        dense(operator, max_bytes=8 * n * n - 1)
