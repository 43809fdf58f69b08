"""ReMax's estimate of the policy gradient (Li et al., arXiv 2310.10505, Algorithm 1), as functions of tensors.

A policy answers a prompt token by token. What is maximised is the mean over answers y that are drawn from it,

    J = E[r(y) - beta * sum_t log(pi(y_t) / ref(y_t))],

the reward minus beta times the Kullback-Leibler divergence to a frozen reference. An answer y contributes

    sum_t G_t * grad log pi(y_t),    G_t = r(y) - b - beta * sum_{u >= t} log(pi(y_u) / ref(y_u)),

to the estimated gradient, where b is the reward of the greedy answer to the same prompt. b does not depend on y, and
the terms before t do not depend on y_t, so neither subtracting b nor leaving those terms out changes the expectation.
There is no value network.

The divergence is part of the reward, as in the paper. The programs of ReMax's and of Adam-mini's authors
(github.com/liziniu/ReMax and github.com/zyushun/Adam-mini, ``compute_returns``) count only the term u = t of it
(``kl_onestep``), which is not the gradient of J; ``one_step`` does so too. They divide by the tokens of a batch.
Here the loss is a mean over answers, so that the estimate's expectation is the gradient of J.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log probabilities of tokens, fp32 [..., T].

    Args:
        logits: [..., T, vocabulary]; position t predicts token t.
        tokens: int64 [..., T].
    """
    return F.log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return the divergence of the next token's distribution from the reference's, in nats, at least 0: [..., T].

    Its sum over the positions of an answer that the policy has drawn is an unbiased estimate of the divergence of
    answers, with less variance than the sum of log ratios of the drawn tokens.

    Args:
        logits: [..., T, vocabulary], of the policy.
        reference: the same of the reference.
    """
    ours, theirs = F.log_softmax(logits.float(), dim=-1), F.log_softmax(reference.float(), dim=-1)
    return (ours.exp() * (ours - theirs)).sum(-1).clamp_min(0)


def returns(advantage: Tensor, log_ratio: Tensor, mask: Tensor, beta: float, *, one_step: bool = False) -> Tensor:
    """Return G_t of every token, [n, T]: the advantage minus beta times the log ratios from t on.

    Args:
        advantage: [n], reward minus baseline.
        log_ratio: [n, T], log probability of each token minus the reference's.
        mask: [n, T], 1 for tokens of the answer, its end included, and 0 after it.
        beta: coefficient of the divergence, at least 0.
        one_step: whether only the log ratio of token t counts.
    """
    later = log_ratio if one_step else (log_ratio * mask).flip(-1).cumsum(-1).flip(-1)
    return (advantage[:, None] - beta * later) * mask


def remax_losses(
    log_probs: Tensor,
    reference: Tensor,
    mask: Tensor,
    rewards: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    one_step: bool = False,
) -> Tensor:
    """Return one loss per answer, [n], whose mean's gradient is minus ReMax's estimate of the policy gradient.

    Its value means nothing; only its gradient does.

    Args:
        log_probs: [n, T], of the drawn tokens; the gradient goes through these alone.
        reference: [n, T], of the same tokens under the reference.
        mask: [n, T], 1 for tokens of the answer, its end included, and 0 after it.
        rewards: [n], of the drawn answers.
        baseline: [n], rewards of the greedy answers to the same prompts.
        beta: coefficient of the divergence.
        one_step: whether only a token's own log ratio counts, as in the authors' programs.

    Raises:
        ValueError: shapes differ, or beta is negative.
    """
    if (
        not log_probs.shape == reference.shape == mask.shape
        or not rewards.shape == baseline.shape == log_probs.shape[:1]
    ):
        shapes = [tuple(x.shape) for x in (log_probs, reference, mask, rewards, baseline)]
        raise ValueError(f"log_probs, reference, mask must be [n, T] and rewards, baseline [n], but are {shapes}")
    if beta < 0:
        raise ValueError(f"beta={beta} must be at least 0; 0 leaves out the divergence")
    with torch.no_grad():
        weights = returns(rewards - baseline, log_probs - reference, mask, beta, one_step=one_step)
    return -(weights * log_probs).sum(-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row by inverting the distribution function, or the most probable one.

    Args:
        logits: [n, vocabulary].
        uniform: [n], numbers in [0, 1) that decide which token is drawn; a negative number takes the most probable one.

    Returns:
        int64 [n].
    """
    upto = F.softmax(logits.double(), dim=-1).cumsum(-1)
    drawn = torch.searchsorted(upto, (uniform.double() * upto[:, -1])[:, None].contiguous(), right=True).squeeze(-1)
    return torch.where(uniform < 0, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
