"""Answers of a language model of transformers: drawn token by token with a cache of keys and values, and scored.

Prompts are padded on the left. What is drawn is a function of the weights and of given random numbers, so a step of
policy-gradient training is a function of (seed, step), however its rows are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .policy_gradient import draw

GREEDY = -1.0
"""In place of a random number: take the most probable token."""


@dataclass(frozen=True)
class Answers:
    """Prompts and an answer to each.

    Attributes:
        prompts: int64 [n, L], padded on the left.
        prompt_mask: int64 [n, L], 1 for tokens of the prompt.
        tokens: int64 [n, T]; after the end of an answer they mean nothing.
        mask: int64 [n, T], 1 for tokens of the answer, the end included.
    """

    prompts: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor

    def rows(self, chosen: Tensor | slice) -> Answers:
        """Return some of the rows."""
        return Answers(self.prompts[chosen], self.prompt_mask[chosen], self.tokens[chosen], self.mask[chosen])


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the left to equal length.

    Args:
        rows: tokens of each row.
        pad: token that fills up.

    Returns:
        (tokens, int64 [n, L]; mask, int64 [n, L], 1 for tokens of the row)
    """
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def positions(mask: Tensor) -> Tensor:
    """Return the position of every token, [n, L]: 0 for the first one that is not padding."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def generate(model: nn.Module, prompts: Tensor, mask: Tensor, uniforms: Tensor, ends: Sequence[int]) -> Answers:
    """Draw one answer per row.

    Every call takes T passes, however soon answers end, so that ranks with shards of one model stay in step.

    Args:
        model: a causal language model of transformers.
        prompts: int64 [n, L], padded on the left.
        mask: int64 [n, L], 1 for tokens of the prompt.
        uniforms: [n, T], numbers in [0, 1) that decide the draws; ``GREEDY`` takes the most probable token.
        ends: tokens that end an answer.

    Raises:
        RuntimeError: the model keeps no keys and values, so that it would see the last token alone.
    """
    going = torch.ones_like(prompts[:, 0])
    seen, cache, inputs, places = mask, None, prompts, positions(mask)
    tokens, alive = [], []
    for t in range(uniforms.shape[1]):
        out: Any = model(
            input_ids=inputs, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        if cache is None:
            raise RuntimeError("the model keeps no keys and values while layers are recomputed; use recompute=False")
        token = draw(out.logits[:, -1], uniforms[:, t])
        tokens.append(token)
        alive.append(going)
        going = going * ~torch.isin(token, torch.tensor(ends, device=token.device))
        inputs, places = token[:, None], places[:, -1:] + 1
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    return Answers(prompts, mask, torch.stack(tokens, 1), torch.stack(alive, 1))


def answer_logits(module: nn.Module, answers: Answers) -> Tensor:
    """Return the logits that predict the answers' tokens, [n, T, vocabulary].

    Args:
        module: a causal language model of transformers, or what wraps it.
        answers: the answers.
    """
    mask = torch.cat([answers.prompt_mask, answers.mask], dim=1)
    length = answers.tokens.shape[1]
    out: Any = module(
        input_ids=torch.cat([answers.prompts, answers.tokens], dim=1), attention_mask=mask,
        position_ids=positions(mask), use_cache=False, logits_to_keep=length + 1,
    )  # fmt: skip
    return out.logits[:, :-1]
