"""Products are symmetric, or refused: weight normalisation, losses without forward mode, custom functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessian import HessianOperator, MatrixOperator, dense
from hessian.second_order import twice_differentiable

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator).double(), torch.randn(6, 2, generator=generator).double()


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]).tanh(), batch[1])


def written_out(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).tanh() - batch[1]).square().mean()


class ByHand(nn.Module):
    """Weight normalisation over all axes but ``dim`` in plain operations, parameters in the order asked for."""

    def __init__(self, like: nn.Linear, g: Tensor, v: Tensor, dim: int | None, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter({"bias": like.bias, "g": g, "v": v}[name].detach().clone()))
        self.axes = [axis for axis in range(2) if axis != dim]

    def forward(self, x: Tensor) -> Tensor:
        norm = self.v.square().sum(self.axes, keepdim=True).sqrt()
        return F.linear(x, self.v / norm * self.g, self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hooks", "new"])
def test_weight_normalisation_is_exact(make: Any, dim: int | None) -> None:
    torch.manual_seed(0)
    model = make(nn.Linear(3, 2).double(), dim=dim)
    params = dict(model.named_parameters())
    letters = {"bias": "bias", "weight_g": "g", "weight_v": "v", "original0": "g", "original1": "v"}
    names = [letters[name.split(".")[-1]] for name in params]
    g, v = (p for n, p in zip(names, params.values(), strict=True) if n != "bias")
    plain = ByHand(model, g, v, dim, names)
    torch.testing.assert_close(plain(data()[0]), model(data()[0]))
    operator = HessianOperator(model, mse, None, [data()])
    found = dense(operator)
    torch.testing.assert_close(found, found.T, **EXACT)
    torch.testing.assert_close(found, dense(HessianOperator(plain, written_out, None, [data()])), **EXACT)


def huber(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.huber_loss(model(batch[0]), batch[1], delta=0.7)


def huber_written_out(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    off = model(batch[0]) - batch[1]
    inside, outside = off.abs() < 0.7, off.abs() >= 0.7
    return (off[inside].square().sum() / 2 + (0.7 * off[outside].abs() - 0.245).sum()) / off.numel()


@pytest.mark.parametrize(
    ("loss", "plain"),
    [(mse, written_out), (lambda m, b: nn.MSELoss()(m(b[0]).tanh(), b[1]), written_out), (huber, huber_written_out)],
    ids=["mse_loss", "MSELoss", "huber_loss"],
)
def test_losses_without_forward_mode_keep_it(loss, plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessian.operators.LINEARISE_AFTER", 0)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loss has no forward-mode")
        operator = HessianOperator(model, loss, None, [data()])
    torch.testing.assert_close(dense(operator), dense(HessianOperator(model, plain, None, [data()])), **EXACT)
    assert operator._programs, "products were not traced"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_plain_operations_compute_what_they_replace(reduction: str) -> None:
    x, y = (torch.randn(4, 5, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    calls = [
        lambda: F.mse_loss(x, y, reduction=reduction),
        lambda: F.mse_loss(input=x, target=y, reduction=reduction),
        lambda: F.huber_loss(x, y, reduction, 0.3),
        lambda: F.huber_loss(x, y, reduction=reduction, weight=y.abs()),
        lambda: F.mse_loss(x, y, reduction=reduction, weight=y.abs()),
        lambda: torch._weight_norm(x, y[:, :1], 0),
        lambda: torch._weight_norm(x, y[:1], 1),
    ]
    for call in calls:
        with twice_differentiable(plain=True):
            found = call()
        torch.testing.assert_close(found, call())


def test_what_is_left_without_forward_mode_is_warned_of_once() -> None:
    model, batch = nn.Linear(3, 2).double(), data()

    def soft(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.soft_margin_loss(model(batch[0]), batch[1].sign())

    with pytest.warns(UserWarning, match=r"soft_margin.*reverse over reverse.*cannot be traced") as caught:
        operator = HessianOperator(model, soft, None, [batch, data(1)])
        operator @ torch.ones(8, dtype=torch.float64)
    assert len([w for w in caught if "reverse over reverse" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:the loss has no forward-mode")
def test_weight_normalisation_is_right_in_reverse_mode_too() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())

    def soft(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.soft_margin_loss(model(batch[0]), batch[1].sign())

    def written(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(-batch[1].sign() * model(batch[0])).mean()

    found, expected = (dense(HessianOperator(model, loss, None, [data()])) for loss in (soft, written))
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(found, found.T, **EXACT)


class Skewed(torch.autograd.Function):
    """x^2 with the right gradient, whose own derivative is of another function."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * (x.detach() + 0.1 * x.roll(1, -1) - 0.1 * x.roll(1, -1).detach()) * grad


def skewed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return Skewed.apply(model(batch[0])).mean()


@pytest.mark.filterwarnings("ignore:the loss has no forward-mode")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_that_is_not_symmetric_is_refused_by_name(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)).to(dtype)
    batch = tuple(x.to(dtype) for x in data())
    with pytest.raises(ValueError, match=r"batches\[0\] is not symmetric.*parameters \['.*autograd function Skewed"):
        HessianOperator(model, skewed, None, [batch])

    def later(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return skewed(model, batch) if torch.equal(batch[1], second[1]) else model(batch[0]).square().mean()

    second = tuple(x.to(dtype) for x in data(1))
    with pytest.raises(ValueError, match=r"batches\[1\] is not symmetric"):
        HessianOperator(model, later, None, [batch, second])


def test_an_embedding_that_leaves_a_row_out_of_its_gradient_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 2)).double()
    model[0].weight.data.normal_()
    tokens = torch.tensor([[0, 1], [2, 0], [3, 3]])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).tanh().square().mean()

    with pytest.raises(ValueError, match=r"not symmetric.*'0.weight'.*embedding '0'.*row 0.*padding_idx to None"):
        HessianOperator(model, loss, None, [tokens])
    HessianOperator(model, loss, None, [tokens.clamp_min(1)])  # nothing is left out where the row is not used
    model[0].padding_idx = None
    found = dense(HessianOperator(model, loss, None, [tokens]))
    torch.testing.assert_close(found, found.T, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_hessian_that_is_zero_but_for_rounding_is_not_refused(dtype: torch.dtype) -> None:
    """A bias added to every logit moves no softmax."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))}).to(dtype)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        scores = batch + (model["shift"].exp() * torch.linspace(1, 2, 4, dtype=dtype)).sum()
        return F.cross_entropy(scores, torch.zeros(len(batch), dtype=torch.int64))

    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 3)]
    operator = HessianOperator(model, loss, None, batches)
    assert float(dense(operator).abs().max()) < 1e-5 and operator._weights == [5 / 8, 3 / 8]


def test_a_matrix_must_be_symmetric_too() -> None:
    with pytest.raises(ValueError, match=r"not symmetric.*matrix \+ matrix.T"):
        MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    for bad, words in ((torch.eye(2) * float("nan"), "NaN"), (torch.eye(2)[:1], "square"), (torch.eye(0), "empty")):
        with pytest.raises(ValueError, match=words):
            MatrixOperator(bad)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if self.reentrant else x
        return self.outer(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_told_from_attention_kernels(reentrant: bool) -> None:
    with pytest.raises(RuntimeError, match=r"gradient checkpointing is on.*gradient_checkpointing_disable") as caught:
        HessianOperator(Checkpointed(reentrant).double(), mse, None, [data()])
    assert "scaled_dot_product_attention" not in str(caught.value)


def test_saved_tensor_hooks_are_named() -> None:
    model = nn.Linear(3, 2).double()
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(RuntimeError, match=r"saved-tensor hooks are active.*save_on_cpu"),
    ):
        HessianOperator(model, written_out, None, [data()])
