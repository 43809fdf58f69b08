"""The operator: products, weights of batches, scipy's view, an untouched model, and every refusal."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, UserDict

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models import lm_loss
from hessian import HessianOperator, dense
from tests.hessian.subjects import batches_for, double_backward, gpt, joined, llama, mlp


def test_products_agree_with_the_matrix() -> None:
    model = llama()
    operator = HessianOperator(model, lm_loss, None, batches_for(model), chunk=3)
    matrix, n = dense(operator), operator.shape[0]
    vectors = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator @ vectors[:, 0], matrix @ vectors[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(operator.matmat(vectors), matrix @ vectors, rtol=0, atol=1e-10)
    torch.testing.assert_close(operator @ vectors, matrix @ vectors, rtol=0, atol=1e-10)
    assert operator.dtype is torch.float64 and operator.shape == (n, n)


def test_batches_are_weighted_by_their_examples() -> None:
    model = mlp()
    ragged = batches_for(model, (9, 1))
    v = torch.ones(HessianOperator(model, lm_loss, None, ragged).shape[0], dtype=torch.float64)
    whole = HessianOperator(model, lm_loss, None, [joined(ragged)]) @ v
    torch.testing.assert_close(HessianOperator(model, lm_loss, None, ragged) @ v, whole, rtol=0, atol=1e-12)
    unweighted = HessianOperator(model, lm_loss, None, ragged, count=lambda batch: 1) @ v
    assert (unweighted - whole).abs().max() > 1e-6, "the count option has no effect"
    gradient = HessianOperator(model, lm_loss, None, ragged).gradient()
    expected = torch.autograd.grad(lm_loss(model, joined(ragged)), list(model.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]), rtol=0, atol=1e-12)


def test_eigsh_works_on_the_scipy_view() -> None:
    model = mlp()
    operator = HessianOperator(model, lm_loss, None, batches_for(model))
    top = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    exact = torch.linalg.eigvalsh(dense(operator))[-2:]
    torch.testing.assert_close(torch.from_numpy(top).sort().values, exact, rtol=1e-8, atol=1e-10)


def test_the_model_is_left_alone() -> None:
    model = gpt()
    model.lm_head.weight.requires_grad_(False)
    model.transformer["wte"].weight.grad = torch.ones_like(model.transformer["wte"].weight)
    before = copy.deepcopy(model.state_dict())
    operator = HessianOperator(model, lm_loss, None, batches_for(model))
    assert "lm_head.weight" not in operator.names, "None means the trainable ones"
    dense(operator)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.lm_head.weight.requires_grad and model.training
    assert torch.equal(model.transformer["wte"].weight.grad, torch.ones_like(model.transformer["wte"].weight))
    assert model.transformer["wpe"].weight.grad is None


def test_values_other_than_the_model_s_own() -> None:
    """Detached tensors, and another point: the Hessian is taken where params says."""
    model, batches = mlp(), batches_for(mlp())
    here = dense(HessianOperator(model, lm_loss, None, batches))
    detached = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(dense(HessianOperator(model, lm_loss, detached, batches)), here, rtol=0, atol=1e-12)
    elsewhere = {name: 0.5 * p for name, p in detached.items()}
    moved = copy.deepcopy(model)
    moved.load_state_dict(elsewhere)
    expected = dense(HessianOperator(moved, lm_loss, None, batches))
    torch.testing.assert_close(dense(HessianOperator(model, lm_loss, elsewhere, batches)), expected, rtol=0, atol=1e-12)
    assert (expected - here).abs().max() > 1e-4


def test_a_shared_tensor_is_named_once() -> None:
    model = gpt(tied=True)
    twice = {"transformer.wte.weight": model.lm_head.weight, "lm_head.weight": model.lm_head.weight}
    with pytest.raises(ValueError, match="shared tensor twice"):
        HessianOperator(model, lm_loss, twice, batches_for(model))


class NoDerivative(torch.autograd.Function):
    """A kernel that computes something and cannot be differentiated."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...


class Kernel(torch.autograd.Function):
    """Like a fused attention kernel: a backward pass of its own, which has none in turn."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return NoDerivative.apply(ctx.saved_tensors[0]) * grad


def regression() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    data = (torch.randn(6, 3, generator=generator).double(), torch.randn(6, 2, generator=generator).double())
    return nn.Linear(3, 2).double(), [data]


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda m, b: (m(b[0]) - b[1]).square().mean(0), TypeError, r"shape \(2,\).*0-dim"),
        (lambda m, b: mse(m, b).item(), TypeError, "0-dim"),
        (lambda m, b: F.mse_loss(m(b[0]), b[1], reduction="sum"), ValueError, "not a mean.*reduction='mean'"),
        (lambda m, b: mse(m, b) * math.nan, ValueError, r"batches\[0\].*nan"),
        (lambda m, b: mse(m, b) / 0.0, ValueError, r"batches\[0\].*inf"),
        (lambda m, b: b[1].square().mean(), ValueError, "does not depend on.*weight.*leave them out"),
        (lambda m, b: (b[0] @ m.weight.T - b[1]).square().mean(), ValueError, r"does not depend on \['bias'\]"),
        (lambda m, b: mse(m, b) + 0.1 * torch.rand((), dtype=torch.float64), ValueError, "random.*eval"),
        (lambda m, b: F.dropout(m(b[0]), 0.5).square().mean(), ValueError, "random.*functional dropout"),
        (lambda m, b: Kernel.apply(m(b[0])).mean(), RuntimeError, "second derivative.*replace it"),
    ],
)  # fmt: skip
def test_bad_losses_are_refused(loss, error, words: str) -> None:
    model, batches = regression()
    with pytest.raises(error, match=words):
        HessianOperator(model, loss, None, batches)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (lambda m: {}, "params is empty"),
        (lambda m: {"nonsense": m.weight}, "'nonsense'.*does not have"),
        (lambda m: {"weight": m.weight[:1]}, r"'weight'.*\(1, 3\).*\(2, 3\).*named_parameters"),
        (lambda m: {"weight": m.weight, "bias": m.bias.float()}, "several dtypes"),
    ],
)
def test_bad_params_are_refused(params, words: str) -> None:
    model, batches = regression()
    with pytest.raises(ValueError, match=words):
        HessianOperator(model, mse, params(model), batches)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (lambda m: list(m.parameters()), r"params is a list.*dict\(model.named_parameters\(\)\)"),
        (lambda m: m.named_parameters(), "params is a generator.*dict name -> tensor"),
        (lambda m: {"weight": [1.0]}, r"params\['weight'\] is a list"),
    ],
)
def test_params_that_are_no_dict_of_tensors_are_refused(params, words: str) -> None:
    model, batches = regression()
    with pytest.raises(TypeError, match=words):
        HessianOperator(model, mse, params(model), batches)


class Output(OrderedDict):
    """What Hugging Face models return: an ordered dict with attributes, whose repr shows every tensor."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda value, logits: Output(loss=value, logits=logits), r"an? Output, which holds the loss.*\.loss"),
        (lambda value, logits: {"loss": value, "logits": logits}, r"a dict, which holds the loss.*\['loss'\]"),
        (lambda value, logits: (value, logits), "a tuple of 2.*the one element that is the loss"),
        (lambda value, logits: None, "None"),
    ],
)
def test_what_a_model_returns_beside_its_loss_is_not_printed(wrap, words: str) -> None:
    model, batches = regression()
    with pytest.raises(TypeError, match=words) as caught:
        HessianOperator(model, lambda m, b: wrap(mse(m, b), m(b[0])), None, batches)
    assert "tensor([" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: [], "batches is empty"),
        (lambda b: None, "batches is empty"),
        (lambda b: [*b, (b[0][0][:0], b[0][1][:0])], r"batches\[1\] holds no data"),
        (lambda b: [*b, [b[0][0], b[0][1]]], r"batches\[1\] has another structure"),
        (lambda b: [*b, (b[0][0].float(), b[0][1])], r"batches\[1\] has another structure"),
    ],
)
def test_bad_batches_are_refused(change, words: str) -> None:
    model, batches = regression()
    with pytest.raises(ValueError, match=words):
        HessianOperator(model, mse, None, change(batches))


def test_random_modules_are_refused_until_eval() -> None:
    torch.manual_seed(0)
    _, batches = regression()
    for layer, words in ((nn.Dropout(0.3), "'1'.*p=0.3.*eval"), (nn.BatchNorm1d(2), "'1'.*running statistics.*eval")):
        model = nn.Sequential(nn.Linear(3, 2), layer).double()
        with pytest.raises(ValueError, match=words):
            HessianOperator(model, mse, None, batches)
        HessianOperator(model.eval(), mse, None, batches)


def test_vectors_of_another_length_are_refused() -> None:
    model, batches = regression()
    with pytest.raises(ValueError, match=r"\(3, 1\).*\[8, k\]"):
        HessianOperator(model, mse, None, batches) @ torch.ones(3, dtype=torch.float64)


def test_grad_mode_of_the_caller_does_not_matter() -> None:
    model, batches = regression()
    expected = dense(HessianOperator(model, mse, None, batches))
    with torch.no_grad():
        torch.testing.assert_close(dense(HessianOperator(model, mse, None, batches)), expected)


class Counting(nn.Module):
    """Writes to a buffer wherever nobody differentiates, as power iterations and moving averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.calls += 1
        return self.linear(x)


def test_buffers_the_forward_pass_writes_to_stay_as_they_were() -> None:
    model, (_, batches) = Counting().double(), regression()
    HessianOperator(model, mse, None, batches)
    assert model.calls == 0


def test_a_loss_that_insists_on_its_batch_size_is_not_refused() -> None:
    model, batches = regression()

    def picky(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert len(batch[0]) == 6
        return mse(model, batch)

    assert HessianOperator(model, picky, None, batches).shape == (8, 8)


def test_a_batch_type_unknown_to_torch_is_named() -> None:
    model, batches = regression()
    with pytest.raises(ValueError, match=r"batches\[0\] is a UserDict.*dict\(batch\)"):
        HessianOperator(model, mse, None, [UserDict(x=batches[0][0])])


def test_parameters_without_axes() -> None:
    """A learned temperature is one number."""
    model, batches = regression()
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5, dtype=torch.float64)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model.scale * model(batch[0]) - batch[1]).square().mean()

    found = dense(HessianOperator(model, loss, None, batches))
    torch.testing.assert_close(found, double_backward(model, batches[0], dict(model.named_parameters()), loss))


def test_a_later_batch_may_need_another_mode() -> None:
    model, (batch,) = regression()
    second = (batch[0], batch[1] + 1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse(model, batch) if torch.equal(batch[1], second[1]) else (model(batch[0]) - batch[1]).square().mean()

    operator = HessianOperator(model, loss, None, [batch, second], count=len)
    torch.testing.assert_close(dense(operator), dense(HessianOperator(model, mse, None, [batch])))
