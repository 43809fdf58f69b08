"""RLHF with ReMax: SmolLM2-135M-Instruct answers short requests, and a reward model judges its answers.

The policy begins as the reference, whose weights are frozen. A step draws answers to a batch of requests, and takes the
greedy answers to the same requests for the baseline. ``policy_gradient`` is the estimator, ``rollouts`` draws.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data import epoch_rows

from . import opinions
from .bases import Base, Pretrained, load_base, require_base
from .policy_gradient import divergence, log_probs_of, remax_losses
from .rollouts import GREEDY, Answers, answer_logits, generate, padded
from .workload import ARMS, Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

logger = logging.getLogger("experiments")
Score = Callable[[Sequence[str]], Tensor]
"""Answers -> rewards, fp32 [n]."""
FEW = 8
"""Rewards of at least so many answers must not all be equal."""
DATA = "opinions"
SHOWN = 8
"""Answers that a run leaves."""


@dataclass(frozen=True)
class ReMax:
    """A policy that is trained by ReMax.

    Attributes:
        base: the pretrained model that the policy begins as.
        width: width of a model with random weights in place of the pretrained one; 0 for the pretrained one.
        rollouts: drawn answers per request and step.
        new_tokens: tokens of an answer at most.
        beta: coefficient of the divergence to the reference.
        one_step: whether only a token's own log ratio counts against it (``policy_gradient``).
        kl_limit: a run whose drawn answers diverge further than this from the reference is stopped, in nats per answer.
    """

    base: Base = "smollm2"
    width: int = 0
    rollouts: int = 2
    new_tokens: int = 16
    beta: float = 0.1
    one_step: bool = False
    kl_limit: float = 20.0

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: the base is unknown, or a number is out of range.
        """
        require_base(self.base, self.width)
        for name, least in (("rollouts", 1), ("new_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if not isinstance(self.one_step, bool):
            raise ValueError(f"one_step={self.one_step!r} must be true or false")
        for name in ("beta", "kl_limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a finite number, at least 0")

    def fetch(self, config: TrainConfig) -> None:
        """Check that libraries, weights and the reward model are there, and make what is missing.

        Raises:
            ValueError: the data is unknown.
            RuntimeError: a library or weights are missing.
        """
        require_data(config.data)
        load_base(self.base, self.width, seed=config.seed)
        trained_score()

    def task(self, config: TrainConfig, device: torch.device) -> Rewarded:
        """Return the task that trains it."""
        return Rewarded(config, self, load_base(self.base, self.width, seed=config.seed), *trained_score(), device)


def require_data(name: str) -> None:
    """Check the name of the requests.

    Raises:
        ValueError: it is not ``opinions``.
    """
    if name != DATA:
        raise ValueError(f"data={name!r} is no set of requests; use {DATA!r}")


def trained_score() -> tuple[Score, str]:
    """Return the rewards of the trained reward model, and its fingerprint.

    Raises:
        RuntimeError: a library is missing, or the model cannot be trained.
    """
    from .trained_reward import trained_reward_model

    judge = trained_reward_model()
    return judge.score, judge.fingerprint


def nothing_to_learn(rewards: Tensor) -> str:
    """Return why nothing can be learnt from rewards: all of at least ``FEW`` are equal. Otherwise "".

    A policy that has gone too far often gives one answer to everything. So this is how a run ends, not an error.

    Raises:
        RuntimeError: a reward is not finite.
    """
    if not bool(torch.isfinite(rewards).all()):
        raise RuntimeError(
            f"{int((~torch.isfinite(rewards)).sum())} of {rewards.numel()} rewards are not finite; check the reward "
            "model"
        )
    if rewards.numel() < FEW or not bool((rewards == rewards.flatten()[0]).all()):
        return ""
    return (
        f"all {rewards.numel()} rewards are {float(rewards.flatten()[0]):g}, so nothing can be learnt; use a lower "
        "learning rate, or check the reward model"
    )


class Rewarded:
    """Rewards of a policy's answers, less the baseline, and what the policy's divergence costs.

    Held-out numbers are those of one drawn answer to each held-out request, whose random numbers are the same at every
    evaluation, for every arm and seed: ``reward`` and its difference to that of the reference (``gain``), ``kl`` (nats
    per answer, from whole distributions), ``length`` in tokens. ``val_loss`` is ``beta * kl - reward``.

    Args:
        config: the run.
        kind: what it trains.
        policy: model and tokenizer.
        score: the reward model.
        fingerprint: hash of the reward model.
        device: where held-out requests are kept.

    Raises:
        ValueError: requests and answers are longer than ``seq_len``, or that is longer than the model's context; or a
            batch has more requests than there are.
    """

    def __init__(
        self, config: TrainConfig, kind: ReMax, policy: Pretrained, score: Score, fingerprint: str, device: torch.device
    ) -> None:
        require_data(config.data)
        self.config, self.kind, self.tokenizer, self.score = config, kind, policy.tokenizer, score
        self.model = policy.model
        self.reference = copy.deepcopy(policy.model).requires_grad_(False).eval().to(device)
        words = [opinions.fingerprint(), policy.fingerprint, fingerprint]
        self.fingerprint = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        self.stopped = ""  # why the run has gone too far, as experiments.tasks.Task says
        self.ends = (policy.tokenizer.eos_token_id,)
        chosen = opinions.VALIDATION[: config.eval_batches * config.batch]
        rows = [opinions.prompts(things, policy.tokenizer) for things in (opinions.TRAINING, chosen)]
        self._require_length(max(len(row) for part in rows for row in part), policy.context)
        pad = policy.tokenizer.pad_token_id
        self.training, held_out = padded(rows[0], pad), padded(rows[1], pad)
        draws = np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 3, 0])).random(
            (len(chosen), kind.new_tokens)
        )
        self.held_out = tuple(x.to(device) for x in (*held_out, torch.from_numpy(draws)))
        self._of_reference: dict[str, float] = {}

    def _require_length(self, longest: int, context: int) -> None:
        total = longest + self.kind.new_tokens
        if total > self.config.seq_len:
            raise ValueError(
                f"seq_len={self.config.seq_len} must be at least {total}: the longest request has {longest} tokens, "
                f"and an answer up to new_tokens={self.kind.new_tokens}"
            )
        if self.config.seq_len > context:
            raise ValueError(f"seq_len={self.config.seq_len} must be at most {context}, the model's context")

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return (requests, int64 [batch, L]; their mask; random numbers, float64 [batch, rollouts, T]) of a step."""
        tokens, mask = self.training
        rows, generator = epoch_rows(len(tokens), self.config.seed, step, self.config.batch)
        draws = generator.random((self.config.batch, self.kind.rollouts, self.kind.new_tokens))
        return tokens[rows], mask[rows], torch.from_numpy(draws)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Draw answers, and return the mean of ReMax's losses, whose gradient is minus the policy gradient.

        If the policy diverges too far from the reference, or all rewards are equal, the loss is not a number and
        ``stopped`` says so.

        Raises:
            RuntimeError: a reward is not finite.
        """
        requests, mask, uniforms = batch
        n, k = len(requests), self.kind.rollouts
        # The greedy answers are drawn in the same passes as the others, as the last n rows.
        drawn = generate(
            self.model,
            torch.cat([requests.repeat_interleave(k, 0), requests]),
            torch.cat([mask.repeat_interleave(k, 0), mask]),
            torch.cat([uniforms.flatten(0, 1), torch.full_like(uniforms[:, 0], GREEDY)]),
            self.ends,
        )
        rewards = self.rewards(drawn)
        answers = drawn.rows(slice(0, n * k))
        logits = answer_logits(module, answers)
        with torch.no_grad():
            reference = answer_logits(self.reference, answers)
            kl = float((divergence(logits, reference) * answers.mask).sum(1).mean())
        if not kl <= self.kind.kl_limit:
            return logits.sum() * self._too_far(kl)
        if reason := nothing_to_learn(rewards):
            return logits.sum() * self.stop(reason)
        return remax_losses(
            log_probs_of(logits, answers.tokens),
            log_probs_of(reference, answers.tokens),
            answers.mask.float(),
            rewards[: n * k],
            rewards[n * k :].repeat_interleave(k),
            beta=self.kind.beta,
            one_step=self.kind.one_step,
        ).mean()

    def _too_far(self, kl: float) -> float:
        """Say that the policy has left the reference, and return what is no number."""
        return self.stop(
            f"the policy's answers diverge by {kl:.1f} nats, over kl_limit={self.kind.kl_limit:g}; use a lower "
            "learning rate or a larger beta"
        )

    def stop(self, reason: str) -> float:
        """Say why the run has gone too far, and return what is no number."""
        self.stopped = reason
        logger.error("%s", reason)
        return float("nan")

    def rewards(self, answers: Answers) -> Tensor:
        """Return the reward of each answer, fp32 [n]."""
        return self.score(self.texts(answers)).to(answers.tokens.device, torch.float32)

    def texts(self, answers: Answers) -> list[str]:
        """Return the answers as text, without the tokens that end them."""
        return [
            self.tokenizer.decode(row[m.bool()], skip_special_tokens=True).strip()
            for row, m in zip(answers.tokens, answers.mask, strict=True)
        ]

    @torch.no_grad()
    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return ``val_loss``, ``reward``, ``gain``, ``kl`` and ``length`` of answers to the held-out requests."""
        if not self._of_reference:
            self._of_reference = self._judge(self.reference, rows, casting)
        found = self._judge(self.model, rows, casting)
        loss = self.kind.beta * found["kl"] - found["reward"]
        if not found["kl"] <= self.kind.kl_limit:
            loss = self._too_far(found["kl"])
        return {"val_loss": loss, **found, "gain": found["reward"] - self._of_reference["reward"]}

    def _judge(self, model: nn.Module, rows: int, casting: Casting) -> dict[str, float]:
        """Return means over held-out requests, of which ``rows`` are answered at a time."""
        rewards, kls, lengths = [], [], []
        size = rows or len(self.held_out[0])
        for start in range(0, len(self.held_out[0]), size):
            requests, mask, uniforms = (part[start : start + size] for part in self.held_out)
            with casting():
                answers = generate(model, requests, mask, uniforms, self.ends)
                ours, theirs = answer_logits(model, answers), answer_logits(self.reference, answers)
                rewards.append(self.rewards(answers))
            kls.append((divergence(ours, theirs) * answers.mask).sum(1))
            lengths.append(answers.mask.sum(1).float())
        return {
            "reward": float(torch.cat(rewards).mean()),
            "kl": float(torch.cat(kls).mean()),
            "length": float(torch.cat(lengths).mean()),
        }

    @torch.no_grad()
    def artefacts(self, *, casting: Casting) -> dict[str, Any]:
        """Return greedy answers of reference and policy to the first held-out requests, with rewards, for seed 0."""
        if self.config.seed:
            return {}
        requests, mask, uniforms = (part[:SHOWN] for part in self.held_out)
        found = {}
        for when, model in (("before", self.reference), ("after", self.model)):
            with casting():
                answers = generate(model, requests, mask, torch.full_like(uniforms, GREEDY), self.ends)
                found[f"{when}_reward"] = [round(reward, 4) for reward in self.rewards(answers).tolist()]
            found[when] = self.texts(answers)
        asked = opinions.requests(opinions.VALIDATION[: len(requests)])
        rows = [{"question": q, **{key: found[key][i] for key in found}} for i, q in enumerate(asked)]
        return {"samples": {"answers": rows}}


RUN: dict[str, Any] = {
    "model": ReMax(),
    "data": DATA,
    "batch": 8,
    "seq_len": 64,
    "steps": 30,
    "eval_every": 10,
    "eval_batches": 4,
    "checkpoint_every": 15,
    "weight_decay": 0.0,
    "precision": "bf16",
}
SMOKE: dict[str, Any] = {
    "model": ReMax(width=64, new_tokens=4),
    "batch": 4,
    "steps": 4,
    "eval_every": 2,
    "eval_batches": 1,
    "checkpoint_every": 2,
}
# Adam-mini's authors, github.com/zyushun/Adam-mini, examples/RLHF/training_scripts/po/remax/run_remax.sh: learning rate
# 2e-7, coefficient 0.1 with one-step terms, 12 requests per GPU, 512 tokens of request and of answer, weight decay 0,
# cosine decay after 10 steps of warm-up, one epoch, bf16, ZeRO-2. Betas are in dschat/remax/rlhf_engine.py, two GPUs in
# README.md, and 60 % of the rows of UltraFeedback in --data_split 4,6,0. Assumed: 61,135 rows (the public binarised
# version). Not taken over: top-p 0.9, rewards clipped at 5, and the division by tokens. One answer per request is Li et
# al., arXiv 2310.10505, Algorithm 1.
_FULL: dict[str, Any] = {
    "model": ReMax("llama-2-7b", rollouts=1, new_tokens=512, beta=0.1, one_step=True, kl_limit=200.0),
    "batch": 24,
    "seq_len": 1024,
    "steps": 36_681 // 24,
    "eval_every": 20,
    "eval_batches": 1,
    "checkpoint_every": 100,
    "lr": 2e-7,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "warmup": 10 / (36_681 // 24),
    "decay": "cosine",
    "precision": "bf16",
}
RATES = (3e-6, 1e-5, 3e-5)
REMAX = Workload(RUN, SMOKE, RATES, ARMS, full={"llama-2-7b": _FULL})
