"""What ranks do in ReMax under DeepSpeed: draw answers to their requests, step, and compare with one process."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.text import tiny_llama
from experiments.workloads.policy_gradient import log_probs_of, remax_losses
from experiments.workloads.rollouts import GREEDY, answer_logits, generate
from optimizer import AdamMini
from tests.interop.plain import OPTIONS, apart
from tests.interop.zero import CONFIG, whole

REQUESTS, LENGTH, TOKENS, STEPS, BETA, END = 6, 5, 6, 5, 0.1, 3
VOCABULARY = 60
"""Requests have tokens below this number."""


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Requests of a rank, int64 [n, L], and the random numbers of their answers, [n, T]: a function of the step."""
    generator = torch.Generator().manual_seed(step)
    requests = torch.randint(END + 1, VOCABULARY, (REQUESTS, LENGTH), generator=generator)
    uniforms = torch.rand(REQUESTS, TOKENS, generator=generator, dtype=torch.float64)
    return requests[rank::world], uniforms[rank::world]


def loss_of(module: nn.Module, model: nn.Module, reference: nn.Module, requests: Tensor, uniforms: Tensor) -> Tensor:
    """The mean of ReMax's losses; an answer's reward is the share of its tokens that are even.

    Args:
        module: what the gradient goes through.
        model: what draws answers.
        reference: the frozen reference.
        requests: int64 [n, L].
        uniforms: [n, T].
    """
    n = len(requests)
    both = torch.cat([requests, requests])
    drawn = generate(
        model, both, torch.ones_like(both), torch.cat([uniforms, torch.full_like(uniforms, GREEDY)]), (END,)
    )
    rewards = (drawn.mask * (drawn.tokens % 2 == 0)).sum(1) / drawn.mask.sum(1)
    answers = drawn.rows(slice(0, n))
    with torch.no_grad():
        theirs = log_probs_of(answer_logits(reference, answers), answers.tokens)
    ours = log_probs_of(answer_logits(module, answers), answers.tokens)
    return remax_losses(ours, theirs, answers.mask.float(), rewards[:n], rewards[n:], beta=BETA).mean()


def alone(world: int) -> dict[str, Tensor]:
    """The weights of one process that takes the mean over all ranks' requests."""
    model = tiny_llama()
    reference, optimizer = copy.deepcopy(model).requires_grad_(False), AdamMini(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [loss_of(model, model, reference, *batch(step, rank, world)) for rank in range(world)]
        torch.stack(parts).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def zero_case(stage: int) -> dict[str, Any]:
    """Clipped steps under ZeRO; the answers are drawn from the engine's module."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny_llama()
    reference = copy.deepcopy(model).requires_grad_(False)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = CONFIG | {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": REQUESTS // world}
    optimizer = AdamMini(model, **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for step in range(STEPS):
        engine.backward(loss_of(engine, engine.module, reference, *batch(step, rank, world)))
        engine.step()
    got = whole(engine)
    return {"difference": apart(got, alone(world)), "moved": apart(got, first), "state": optimizer.state_bytes()}
