"""ReMax's estimator against the exact gradient of a small autoregressive policy whose answers are enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from experiments.workloads import policy_gradient as pg
from experiments.workloads import rollouts

TOKENS, LENGTH, END, BETA = 3, 4, 0, 0.7
"""Token 0 ends an answer; longer answers are cut."""


def answers() -> tuple[Tensor, Tensor]:
    """All answers, [n, T] each: tokens (0 after the end) and mask."""
    found = []
    for tokens in itertools.product(range(TOKENS), repeat=LENGTH):
        end = tokens.index(END) if END in tokens else LENGTH
        if all(token == END for token in tokens[end:]):
            found.append((tokens, [float(t <= end) for t in range(LENGTH)]))
    return torch.tensor([f[0] for f in found]), torch.tensor([f[1] for f in found], dtype=torch.float64)


@pytest.fixture
def policy() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [position, previous token, token] of the policy and its reference, and the reward of every answer."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(2, LENGTH, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    return made[0].requires_grad_(), made[1], torch.randn(len(answers()[0]), generator=generator, dtype=torch.float64)


def log_probs(table: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities [n, T] of tokens; each depends on the token before it and on its position."""
    before = torch.cat([torch.full_like(tokens[:, :1], 1), tokens[:, :-1]], dim=1)
    rows = table.log_softmax(-1)[torch.arange(LENGTH), before]
    return rows.gather(-1, tokens[..., None]).squeeze(-1)


def exact(table: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
    """Gradient of the mean reward minus beta times the divergence, from its definition over all answers."""
    tokens, mask = answers()
    ours, theirs = ((log_probs(t, tokens) * mask).sum(1) for t in (table, reference))
    probability = ours.exp()
    assert torch.isclose(probability.sum(), torch.ones((), dtype=torch.float64))
    (gradient,) = torch.autograd.grad((probability * (rewards - BETA * (ours - theirs))).sum(), table)
    return gradient


def expected(
    table: Tensor, reference: Tensor, rewards: Tensor, baseline: float, losses: Callable[..., Tensor] = pg.remax_losses
) -> Tensor:
    """Minus the expectation of the loss's gradient over all answers."""
    tokens, mask = answers()
    ours = log_probs(table, tokens)
    each = losses(ours, log_probs(reference, tokens), mask, rewards, torch.full_like(rewards, baseline), beta=BETA)
    probability = (ours.detach() * mask).sum(1).exp()
    (gradient,) = torch.autograd.grad(-(probability * each).sum(), table)
    return gradient


@pytest.mark.parametrize("baseline", [0.0, 0.4, -3.0])
def test_the_estimate_is_the_gradient_on_average_whatever_the_baseline(
    policy: tuple[Tensor, Tensor, Tensor], baseline: float
) -> None:
    torch.testing.assert_close(expected(*policy, baseline), exact(*policy), rtol=1e-12, atol=1e-12)


FAULTS: dict[str, Callable[..., Tensor]] = {
    "sign": lambda *a, beta: -pg.remax_losses(*a, beta=beta),
    "sign of the divergence": lambda p, q, m, r, b, beta: pg.remax_losses(p, 2 * p.detach() - q, m, r, b, beta=beta),
    "no divergence": lambda *a, beta: pg.remax_losses(*a, beta=0.0),
    "half the divergence": lambda *a, beta: pg.remax_losses(*a, beta=beta / 2),
    "only the token's own log ratio": partial(pg.remax_losses, one_step=True),
    "tokens after the end": lambda p, q, m, r, b, beta: pg.remax_losses(p, q, torch.ones_like(m), r, b, beta=beta),
    "divided by the number of tokens": lambda p, q, m, r, b, beta: pg.remax_losses(p, q, m, r, b, beta=beta) / m.sum(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_faults(policy: tuple[Tensor, Tensor, Tensor], fault: str) -> None:
    difference = (expected(*policy, 0.4, FAULTS[fault]) - exact(*policy)).abs().max()
    assert difference > 0.01


def test_one_step_counts_the_log_ratio_of_the_token_alone() -> None:
    ours, theirs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    each = pg.remax_losses(ours, theirs, mask, torch.ones(3), torch.zeros(3), beta=BETA, one_step=True)
    torch.testing.assert_close(each, -((1 - BETA * (ours - theirs)) * mask * ours).sum(1))


def test_a_bandit_learns_the_tilted_reference(policy: tuple[Tensor, Tensor, Tensor]) -> None:
    """The best policy of a bandit is the reference times exp(reward / beta), normalised: known in closed form."""
    rewards = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = reference.clone().requires_grad_()
    one, arms = torch.ones(3, 1, dtype=torch.float64), torch.arange(3)[:, None]
    for _ in range(400):
        ours = logits.log_softmax(-1)[arms]
        greedy = rewards[logits.argmax()].expand(3)
        each = pg.remax_losses(ours, reference[arms], one, rewards, greedy, beta=BETA)
        (gradient,) = torch.autograd.grad((ours.detach().exp().squeeze(1) * each).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    torch.testing.assert_close(logits.softmax(-1), (reference + rewards / BETA).softmax(-1), rtol=1e-6, atol=1e-6)


def test_samples_have_the_policys_frequencies_and_give_the_gradient() -> None:
    """Drawn answers, and the mean of the estimate over them, within four standard errors of their expectations."""
    logits = torch.tensor([0.2, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    reference, count = torch.zeros(4, dtype=torch.float64).log_softmax(-1), 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = pg.draw(logits.detach().expand(count, -1), uniform)
    probability = logits.detach().softmax(-1)
    seen = torch.bincount(drawn, minlength=4) / count
    assert bool(((seen - probability).abs() < 4 * (probability / count).sqrt()).all())
    ours = logits.log_softmax(-1)[drawn][:, None]
    greedy = rewards[logits.argmax()].expand(count)
    each = pg.remax_losses(ours, reference[drawn][:, None], torch.ones_like(ours), rewards[drawn], greedy, beta=BETA)
    (gradient,) = torch.autograd.grad(-each.mean(), logits)
    wanted = torch.autograd.grad(
        (logits.softmax(-1) * (rewards - BETA * (logits.log_softmax(-1) - reference))).sum(), logits
    )[0]
    assert bool(((gradient - wanted).abs() < 4 * 2.5 / count**0.5).all())


def test_draw_takes_the_most_probable_token_and_never_an_impossible_one() -> None:
    logits = torch.tensor([[0.0, 3.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    assert pg.draw(logits, torch.tensor([-1.0, -1.0])).tolist() == [1, 0]
    assert pg.draw(logits, torch.tensor([0.0, 0.0])).tolist() == [0, 0]
    assert pg.draw(logits, torch.tensor([1 - 1e-7, 1 - 1e-7])).tolist() == [1, 0]


def test_the_divergence_of_tokens_is_exact_and_never_negative() -> None:
    ours, theirs = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=ours), torch.distributions.Categorical(logits=theirs)
    )
    torch.testing.assert_close(pg.divergence(ours, theirs), wanted)
    assert float(pg.divergence(ours, ours).max()) == 0


def test_wrong_shapes_and_a_negative_beta_are_named() -> None:
    x, row = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"must be \[n, T\] and rewards, baseline \[n\]"):
        pg.remax_losses(x, x, x, torch.zeros(2, 1), row, beta=0.1)
    with pytest.raises(ValueError, match="beta=-1"):
        pg.remax_losses(x, x, x, row, row, beta=-1)


def test_a_model_without_a_cache_is_refused() -> None:
    """Each further token would be drawn from the last one alone."""

    class Recomputing(torch.nn.Module):
        def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, TOKENS), past_key_values=None)

    prompts = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="use recompute=False"):
        rollouts.generate(Recomputing(), prompts, prompts, torch.full((2, 2), 0.5), (END,))
