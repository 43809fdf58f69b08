"""Every rival's update against its paper: worked examples, or the paper's lines in float64 and without any library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.rivals import RIVALS, Setup
from experiments.rivals.hift import HiFT
from experiments.rivals.installed import PEERS, pytorch_optimizer
from experiments.rivals.low_rank import ApolloMini
from experiments.rivals.microadam import MicroAdam, quantized, unquantized
from experiments.rivals.scale import Scale
from experiments.rivals.zhai import AdafactorZhai
from optimizer import Role

Array = Any
LR, DECAY, BETAS = 0.01, 0.1, (0.9, 0.95)


def noise(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def steps(optimizer: torch.optim.Optimizer, parameter: Tensor, grads: Sequence[Tensor]) -> Array:
    """The parameter after a step with each gradient, float64."""
    for grad in grads:
        parameter.grad = grad.clone().to(parameter.dtype)
        optimizer.step()
    return parameter.detach().double().numpy()


def made(arm: str, role: Role, *parameters: Tensor) -> torch.optim.Optimizer:
    """A rival for parameters that all have one role."""
    names = [f"w{i}.weight" for i in range(len(parameters))]
    groups = [{"params": list(parameters), "param_names": names, "weight_decay": DECAY}]
    return RIVALS[arm].build(Setup(groups, LR, BETAS, DECAY, 0, dict.fromkeys(names, frozenset({role}))))


def run(arm: str, start: Tensor, grads: Sequence[Tensor], role: Role = Role.MLP_IN) -> Array:
    """A matrix after some steps of a rival. A second matrix is there to be the output layer."""
    parameter, last = start.clone().requires_grad_(), torch.zeros(2, 2, requires_grad=True)
    return steps(made(arm, role, parameter, last), parameter, grads)


def grads_of(*shape: int, count: int = 6, size: float = 1.0) -> tuple[Tensor, list[Tensor], list[Array]]:
    """A start, gradients, and the gradients in float64."""
    grads = [size * noise(i + 1, *shape) for i in range(count)]
    return noise(0, *shape), grads, [grad.double().numpy() for grad in grads]


# -------------------------------------------------------------------------------------------- written here


def test_scale_by_hand() -> None:
    """Rows (3, 4, 0) and (0, 0, 5) have the RMS 5 / sqrt(3); columns the RMS 3, 4 and 5, over sqrt(2)."""
    grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    for embedding, expected in (
        (False, math.sqrt(3) / 5 * grad),
        (True, math.sqrt(2) * torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])),
    ):
        weight = torch.ones(2, 3, requires_grad=True)
        optimizer = Scale([{"params": [weight], "embedding": embedding, "weight_decay": 0.5}], lr=0.1)
        after = steps(optimizer, weight, [grad])
        np.testing.assert_allclose(after, (0.95 - 0.1 * expected).numpy(), rtol=1e-6)
        assert set(optimizer.state[weight]) == {"step"}


def test_scale_gives_momentum_to_the_output_layer_alone() -> None:
    start, grads, g = grads_of(3, 4, count=2)
    parameter = start.clone().requires_grad_()
    groups = [{"params": [parameter], "param_names": ["w"], "weight_decay": 0.0}]
    optimizer = RIVALS["scale"].build(Setup(groups, LR, BETAS, 0.0, 0, {"w": frozenset({Role.HEAD})}))
    moment, expected = np.zeros((3, 4)), start.double().numpy()
    for grad in g:
        moment = 0.9 * moment + 0.1 * grad
        expected = expected - LR * moment / np.sqrt((moment**2).mean(1, keepdims=True))
    np.testing.assert_allclose(steps(optimizer, parameter, grads), expected, atol=1e-6)


def micro_adam(start: Array, grads: list[Array], density: float, window: int, block: int, bucket: int) -> Array:
    """Algorithm 1 of the paper, entry by entry."""
    size, history = len(start), []
    weight, error = [float(w) for w in start], [0.0] * size
    for t, grad in enumerate(grads, 1):
        whole = [grad[i] + error[i] for i in range(size)]
        chosen: list[int] = []
        for low in range(0, size, block):
            places = list(range(low, min(low + block, size)))
            places.sort(key=lambda i: -abs(whole[i]))
            chosen += places[: math.ceil(density * len(places))]
        history.append({i: float(torch.tensor(whole[i]).bfloat16()) for i in chosen})
        for i in chosen:
            whole[i] = 0.0
        for low in range(0, size, bucket):
            places = list(range(low, min(low + bucket, size)))
            smallest, largest = min(whole[i] for i in places), max(whole[i] for i in places)
            unit = (largest - smallest) / 15
            for i in places:
                error[i] = math.floor((whole[i] - smallest) / unit + 0.5) * unit + smallest if unit else smallest
        for i in range(size):
            sums = [0.0, 0.0]
            for power, beta in enumerate(BETAS):
                for age, entries in enumerate(reversed(history[-window:])):
                    sums[power] += beta**age * entries.get(i, 0.0) ** (power + 1)
                sums[power] *= (1 - beta) / (1 - beta**t)
            weight[i] = (1 - LR * DECAY) * weight[i] - LR * sums[0] / (1e-8 + math.sqrt(sums[1]))
    return np.array(weight)


@pytest.mark.parametrize("size", [11, 12, 8, 1])
def test_microadam_against_the_papers_lines(size: int) -> None:
    """Blocks of 4 and buckets of 5 are not full; 9 steps fill the window of 3 more than once."""
    options = {"density": 0.3, "window": 3, "block": 4, "bucket": 5}
    start, grads, g = grads_of(size, count=9)
    weight = start.clone().requires_grad_()
    optimizer = MicroAdam([{"params": [weight], "weight_decay": DECAY}], LR, BETAS, **options)
    expected = micro_adam(start.double().numpy(), g, **options)
    np.testing.assert_allclose(steps(optimizer, weight, grads), expected, atol=2e-5)


def test_four_bit_errors_by_hand() -> None:
    values = torch.tensor([0.0, 1.5, 0.74, 0.76, 0.1, -3.0, -3.0])
    packed, ranges = quantized(values, 5)
    assert packed.tolist() == [0 | 15 << 4, 7 | 8 << 4, 1, 0]
    assert ranges.tolist() == [[0.0, -3.0], [1.5, -3.0]]
    torch.testing.assert_close(
        unquantized(packed, ranges, 7, 5), torch.tensor([0.0, 1.5, 0.7, 0.8, 0.1, -3.0, -3.0])
    )  # fmt: skip


def test_hift_is_adamw_of_one_layer_at_a_time() -> None:
    start, grads, _ = grads_of(3, 4, count=6)
    first, second, alone = (start.clone().requires_grad_() for _ in range(3))
    optimizer = HiFT([{"params": [first, second], "layers": [0, 1], "weight_decay": DECAY}], LR, BETAS)
    adamw = torch.optim.AdamW([alone], lr=LR, betas=BETAS, weight_decay=DECAY)
    for number, grad in enumerate(grads):
        assert optimizer.active == number % 2
        before = second.detach().clone()
        first.grad, second.grad, alone.grad = grad.clone(), grad.clone(), grad.clone()
        optimizer.step()
        if number % 2 == 0:
            adamw.step()
            assert torch.equal(second, before)
    torch.testing.assert_close(first, alone)
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [3, 3]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_apollo_mini_against_the_papers_lines(shape: tuple[int, int]) -> None:
    start, grads, g = grads_of(*shape)
    grads[3], g[3] = 50 * grads[3], 50 * g[3]  # so that the growth of the norm is limited
    weight = start.clone().requires_grad_()
    optimizer = ApolloMini([{"params": [weight], "weight_decay": DECAY}], LR, BETAS, seed=7, gap=4)
    expected, m, v, before = start.double().numpy(), 0.0, 0.0, 0.0
    for t, grad in enumerate(g, 1):
        vector = optimizer.vector(weight, 0, (t - 1) // 4).double().numpy()
        low = grad @ vector if shape[0] >= shape[1] else vector @ grad
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low**2
        corrected = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        scaled = np.linalg.norm(corrected) / np.linalg.norm(low) * grad
        # The limit acts before Adam's correction of the bias, as in the authors' code.
        correction = math.sqrt(1 - 0.95**t) / (1 - 0.9**t)
        norm = np.linalg.norm(scaled) / correction
        limit = max(norm / before, 1.01) / 1.01 if before else 1.0
        before = norm / limit
        expected = (expected - LR * math.sqrt(128) * scaled / limit) * (1 - LR * DECAY)
    np.testing.assert_allclose(steps(optimizer, weight, grads), expected, rtol=1e-4, atol=1e-5)


def test_apollo_moves_along_the_gradient_and_the_librarys_does_not() -> None:
    """pytorch_optimizer 4.1.0's updates have rank one. When this fails, its class may do for the arm."""
    grad = noise(1, 6, 4)
    ours, theirs = torch.zeros(6, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    steps(ApolloMini([{"params": [ours]}], LR, BETAS, seed=0), ours, [grad])
    torch.testing.assert_close(ours / ours.norm(), -grad / grad.norm())
    options = {"rank": 1, "update_proj_gap": 200, "scale": 128, "projection_type": "std"}
    steps(pytorch_optimizer().APOLLO([{"params": [theirs], **options}], lr=LR), theirs, [grad])
    assert torch.linalg.matrix_rank(theirs.detach()) == 1


def test_adafactor_of_zhai_against_its_lines() -> None:
    start, grads, g = grads_of(3, 4, count=5, size=1e-4)
    weight = start.clone().requires_grad_()
    optimizer = AdafactorZhai([{"params": [weight], "weight_decay": DECAY}], LR)
    expected, row, column, m = start.double().numpy(), 0.0, 0.0, 0.0
    for t, grad in enumerate(g, 1):
        beta2 = min(0.999, 1 - t**-0.8)
        row = beta2 * row + (1 - beta2) * (grad**2 + 1e-30).mean(1)
        column = beta2 * column + (1 - beta2) * (grad**2 + 1e-30).mean(0)
        update = grad / np.sqrt(np.outer(row, column) / row.mean())
        update = update / max(1.0, math.sqrt((update**2).mean()))
        m = 0.9 * m + 0.1 * update
        expected = (1 - LR * DECAY) * expected - LR * m
    np.testing.assert_allclose(steps(optimizer, weight, grads), expected, atol=2e-4)  # momentum has 8 bits
    assert np.abs(expected - start.double().numpy()).max() > 1e-2


# --------------------------------------------------------------------------------------------- of libraries


def adafactor(start: Array, grads: list[Array]) -> Array:
    weight, row, column = start, 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        keep = 1 - t**-0.8
        row = keep * row + (1 - keep) * (grad**2 + 1e-30).mean(1)
        column = keep * column + (1 - keep) * (grad**2 + 1e-30).mean(0)
        update = grad / np.sqrt(np.outer(row, column) / row.mean())
        update = update / max(1.0, math.sqrt((update**2).mean()))
        rate = max(1e-3, math.sqrt((weight**2).mean())) * min(LR, 1 / math.sqrt(t))
        weight = (1 - LR * DECAY) * weight - rate * update
    return weight


def lion(start: Array, grads: list[Array]) -> Array:
    weight, m = start, np.zeros_like(start)
    for grad in grads:
        weight = (1 - LR * 10 * DECAY) * weight - LR * np.sign(0.9 * m + 0.1 * grad)
        m = 0.99 * m + 0.01 * grad
    return weight


def sgd(start: Array, grads: list[Array]) -> Array:
    weight, m = start, 0.0
    for grad in grads:
        m = 0.9 * m + grad
        weight = weight - LR * (grad + 0.9 * m)
    return weight


def sm3(start: Array, grads: list[Array]) -> Array:
    weight, row, column, m = start, np.zeros((len(start), 1)), np.zeros((1, start.shape[1])), 0.0
    for grad in grads:
        bound = np.minimum(row, column) + grad**2
        row, column = bound.max(1, keepdims=True), bound.max(0, keepdims=True)
        m = 0.9 * m + 0.1 * grad / np.sqrt(bound)
        weight = weight - LR * m
    return weight


def came(start: Array, grads: list[Array]) -> Array:
    weight, m = start, 0.0
    means = [np.zeros(size) for size in (*start.shape, *start.shape)]

    def divided(row: int, squares: Array, beta: float) -> Array:
        means[row] = beta * means[row] + (1 - beta) * squares.mean(1)
        means[row + 1] = beta * means[row + 1] + (1 - beta) * squares.mean(0)
        return np.sqrt(np.outer(means[row], means[row + 1]) / means[row].mean())

    for grad in grads:
        update = grad / divided(0, grad**2 + 1e-30, 0.95)
        update = update / max(1.0, math.sqrt((update**2).mean()))
        m = 0.9 * m + 0.1 * update
        weight = (1 - LR * DECAY) * weight - LR * m / divided(2, (update - m) ** 2 + 1e-16, 0.9999)
    return weight


@pytest.mark.parametrize("lines", [adafactor, lion, sgd, sm3, came])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_libraries_against_the_papers_lines(lines: Callable[[Array, list[Array]], Array], size: float) -> None:
    start, grads, g = grads_of(3, 4, size=size)
    expected = lines(start.double().numpy(), g)
    np.testing.assert_allclose(run(lines.__name__, start, grads), expected, rtol=2e-4, atol=2e-5)


def test_torchs_default_of_adafactor_is_another_update_for_small_gradients() -> None:
    """Why the arm sets eps: the default is a lower bound of the mean squared gradient, and above small ones."""
    start, grads, g = grads_of(3, 4, size=1e-5)
    grads, g = grads[:1] + [0.1 * grad for grad in grads[1:]], g[:1] + [0.1 * grad for grad in g[1:]]
    default = start.clone().requires_grad_()
    theirs = steps(torch.optim.Adafactor([default], lr=LR, weight_decay=DECAY), default, grads)
    expected, ours = adafactor(start.double().numpy(), g), run("adafactor", start, grads)
    assert np.abs(ours - expected).max() < 1e-5 < 1e-3 < np.abs(theirs - expected).max()


def test_soap_against_its_lines() -> None:
    """Adam in the eigenbasis of the first gradient's matrices, from the second gradient on."""
    start, grads, g = grads_of(3, 4, count=5)
    left, right = (np.linalg.eigh(x + 1e-30 * np.eye(len(x)))[1] for x in (g[0] @ g[0].T, g[0].T @ g[0]))
    weight, m, v = start.double().numpy(), 0.0, 0.0
    for t, grad in enumerate(g[1:], 1):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * (left.T @ grad @ right) ** 2
        update = (left.T @ m @ right) / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        weight = (weight - LR * left @ update @ right.T) * (1 - LR * DECAY)
    # The eigenvectors of a matrix of rank 3 of 4 are right in float32 to about 1e-3.
    np.testing.assert_allclose(run("soap", start, grads), weight, atol=1e-3)


@pytest.mark.parametrize("arm", ["muon", "normuon", "adamuon"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_orthogonal_updates_have_an_rms_of_a_fifth_and_the_directions_of_the_gradient(
    arm: str, shape: tuple[int, int]
) -> None:
    """The first step: momentum is along the gradient, whose singular vectors the update keeps."""
    grad = noise(1, *shape)
    update = -run(arm, torch.zeros(shape), [grad]) / LR
    assert 0.15 < math.sqrt((update**2).mean()) < 0.25
    u, _, vh = np.linalg.svd(grad.double().numpy(), full_matrices=False)
    orthogonal = u @ vh
    cosine = (update * orthogonal).sum() / np.linalg.norm(update) / np.linalg.norm(orthogonal)
    assert cosine > (0.7 if arm == "adamuon" else 0.95)


@pytest.mark.parametrize("arm", ["muon", "normuon", "adamuon", "galore", "apollo_mini"])
def test_what_a_method_leaves_to_adamw_gets_adamw(arm: str) -> None:
    start, grads, _ = grads_of(3, 4)
    weight, alone = start.clone().requires_grad_(), start.clone().requires_grad_()
    after = steps(made(arm, Role.TOKEN_EMBEDDING, weight), weight, grads)
    adamw = torch.optim.AdamW([alone], lr=LR, betas=BETAS, weight_decay=DECAY)
    np.testing.assert_array_equal(after, steps(adamw, alone, grads))


def test_galore_of_full_rank_is_adam_in_the_gradients_basis_times_a_quarter() -> None:
    start, grads, g = grads_of(4, 3, count=4)
    vh = np.linalg.svd(g[0], full_matrices=False)[2]
    weight, m, v = start.double().numpy(), 0.0, 0.0
    for t, grad in enumerate(g, 1):
        low = grad @ vh.T
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low**2
        update = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.95**t))
        weight = (weight - LR * 0.25 * update @ vh) * (1 - LR * DECAY)
    np.testing.assert_allclose(run("galore", start, grads), weight, atol=1e-4)


@pytest.mark.skipif(not PEERS.is_dir(), reason=f"torchao is not in {PEERS}; run `make peers`")
@pytest.mark.parametrize(("arm", "far"), [("adamw8bit", 2e-3), ("adamw4bit", 2e-2)])
def test_quantized_moments_change_later_steps_a_little(arm: str, far: float) -> None:
    """The first step is exact, since a moment is rounded after its use; 64 x 64 values are quantized."""
    start, grads, _ = grads_of(64, 64)
    for count, limit in ((1, 1e-6), (6, far)):
        weight, alone = start.clone().requires_grad_(), start.clone().requires_grad_()
        after = steps(made(arm, Role.MLP_IN, weight), weight, grads[:count])
        adamw = torch.optim.AdamW([alone], lr=LR, betas=BETAS, weight_decay=DECAY)
        difference = np.abs(after - steps(adamw, alone, grads[:count]))
        assert difference.mean() < limit, difference.mean()
    assert difference.max() > 1e-5
