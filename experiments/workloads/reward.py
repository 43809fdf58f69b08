"""A reward model with TRL's RewardTrainer: SmolLM2-135M with a scalar head learns which sentences people find positive.

Pairs are sentences of the same source whose mean human ratings differ by at least 1 (``experiments.data.ratings``).
Each sentence is the answer to one fixed request, so that the model can score what a policy answers: its reward says how
positive people would find the sentence. The loss is Bradley and Terry's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import ratings

from .bases import Base, load_base, require_base
from .libraries import library
from .sft import padded, require_context
from .workload import Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.interruption import Interruption
    from experiments.tasks import Casting
    from experiments.train import Options

    from .trl_loop import TrainerLoop

REQUEST = "Write one short sentence of opinion."
"""What every sentence answers. The system message is empty, because tokens that are always there cost time."""
SCORED = 32
"""Sequences per forward pass on held-out pairs."""
BINS = 5
"""Equal intervals of the confidence, from 1/2 to 1, over which calibration is measured."""


@dataclass(frozen=True)
class RewardModel:
    """A language model with a scalar head.

    Attributes:
        base: the pretrained model.
        width: width of a model with random weights in place of the pretrained one; 0 for the pretrained one.
    """

    base: Base = "smollm2"
    width: int = 0

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: the base is unknown, or the width is no number of heads.
        """
        require_base(self.base, self.width)

    def fetch(self, config: TrainConfig) -> None:
        """Check that libraries, weights and pairs are there, and download what is missing.

        Raises:
            FileNotFoundError: pairs or weights have to be put into the cache folder by hand.
            RuntimeError: a library is missing, or a package cannot be had or is not the pinned one.
            ValueError: the data is unknown, or the sequences are longer than the model's context.
        """
        for name in ("trl", "datasets"):
            library(name, "the reward model")
        ratings.comparisons(config.data)
        require_context(config.seq_len, load_base(self.base, self.width, seed=config.seed, scalar=True))

    @staticmethod
    def loop(config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> TrainerLoop:
        """Return the loop that trains it."""
        from .trl_loop import TrainerLoop

        return TrainerLoop(config, folder, options, interruption, Judging(config, config.model))


def chat(tokenizer: Any, answer: str, request: str = "") -> list[int]:
    """Return the tokens of a request and an answer in the chat template.

    Args:
        tokenizer: the model's tokenizer.
        answer: the answer.
        request: the request; ``REQUEST`` if it is empty.
    """
    messages = [("system", ""), ("user", request or REQUEST), ("assistant", answer)]
    written = [{"role": role, "content": content} for role, content in messages]
    return list(tokenizer.apply_chat_template(written, return_dict=False))


def tokenised(pairs: Sequence[ratings.Comparison], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Return pairs as tokens; pairs with an answer that is too long are left out.

    Args:
        pairs: what is compared.
        tokenizer: the model's tokenizer.
        length: largest number of tokens, those of the request included.

    Raises:
        ValueError: no pair is left.
    """
    both = [
        {
            "chosen_ids": chat(tokenizer, pair.better, pair.request),
            "rejected_ids": chat(tokenizer, pair.worse, pair.request),
        }
        for pair in pairs
    ]
    kept = [row for row in both if max(map(len, row.values())) <= length]
    if not kept:
        raise ValueError(f"seq_len={length} leaves none of {len(both)} pairs; increase it")
    return kept


class Judging:
    """Bradley and Terry's loss of pairs, and how often and how surely held-out pairs are ordered as people do.

    Args:
        config: the run.
        kind: what is trained.

    Raises:
        ValueError: the data is unknown, a split is empty, or the sequences are longer than the model's context.
    """

    def __init__(self, config: TrainConfig, kind: RewardModel) -> None:
        base = load_base(kind.base, kind.width, seed=config.seed, scalar=True)
        require_context(config.seq_len, base)
        self.config, self.model, self.tokenizer = config, base.model, base.tokenizer
        train, held_out = ratings.comparisons(config.data)
        rows = tokenised(train, base.tokenizer, config.seq_len)
        wanted = config.eval_batches * config.batch
        self.held_out = tokenised(held_out[:wanted], base.tokenizer, config.seq_len)
        self.fingerprint = hashlib.sha256(json.dumps([rows, self.held_out, base.fingerprint]).encode()).hexdigest()
        self.pairs = library("datasets", "the reward model").Dataset.from_list(rows)
        self.examples = len(self.pairs)

    def trainer(self, rows: list[int], arguments: dict[str, Any], **options: Any) -> Any:
        """Return TRL's trainer of pairs."""
        trl = library("trl", "the reward model")
        args = trl.RewardConfig(**arguments, max_length=self.config.seq_len)
        data = self.pairs.select(rows)
        return trl.RewardTrainer(self.model, args, train_dataset=data, processing_class=self.tokenizer, **options)

    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the loss per held-out pair in nats, the share that is ordered as people do, and its calibration."""
        margins = self.margins(rows or SCORED, casting)
        found = {"val_loss": F.softplus(-margins).mean().item(), "accuracy": accuracy(margins)}
        return {**found, "calibration_error": calibration(margins)[0], "margin": margins.mean().item()}

    def artefacts(self, *, casting: Casting) -> dict[str, Any]:
        """Return the calibration by confidence, for seed 0."""
        if self.config.seed:
            return {}
        error, bins = calibration(self.margins(SCORED, casting))
        return {"calibration": {"pairs": len(self.held_out), "error": error, "bins": bins}}

    def margins(self, rows: int, casting: Casting) -> Tensor:
        """Return the reward of the better sentence less that of the other, fp32 [pairs]."""
        sequences = [row[key] for row in self.held_out for key in ("chosen_ids", "rejected_ids")]
        scored = rewards(self.model, sequences, rows, casting).reshape(-1, 2)
        return scored[:, 0] - scored[:, 1]


@torch.no_grad()
def rewards(model: nn.Module, sequences: Sequence[Sequence[int]], rows: int, casting: Casting) -> Tensor:
    """Return the reward of each sequence of tokens, fp32 [n] on the host.

    Args:
        model: has a scalar head at the last token that is no padding.
        sequences: tokens; each ends with one that is no padding.
        rows: sequences per forward pass; sequences of similar length are taken together.
        casting: returns the context of a forward pass.
    """
    device, training = next(model.parameters()).device, model.training
    pad: int = model.config.pad_token_id  # type: ignore[union-attr,assignment]
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found = torch.zeros(len(sequences))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens = padded([sequences[i] for i in chosen], pad).to(device)
        mask = padded([[1] * len(sequences[i]) for i in chosen], 0).to(device)
        with casting():
            scored = model(input_ids=tokens, attention_mask=mask).logits
        found[chosen] = scored[:, 0].float().cpu()
    model.train(training)
    return found


def accuracy(margins: Tensor) -> float:
    """Return the share of positive margins; a margin of 0 counts one half."""
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()


def calibration(margins: Tensor) -> tuple[float, list[dict[str, float]]]:
    """Compare how sure a model is with how often it is right.

    Args:
        margins: reward of the better sentence less that of the other, [pairs].

    Returns:
        (expected calibration error: the mean over pairs of |confidence - accuracy| of the pair's bin; for each bin that
        has pairs, their number, mean confidence and accuracy)
    """
    right = torch.sigmoid(margins.double())
    sure, correct = torch.maximum(right, 1 - right).numpy(), (margins > 0).double().numpy()
    of = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {"pairs": int((of == b).sum()), "confidence": sure[of == b].mean(), "accuracy": correct[of == b].mean()}
        for b in range(BINS)
        if (of == b).any()
    ]
    error = sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(margins)
    return float(error), [{key: round(float(value), 4) for key, value in b.items()} for b in bins]


_RUN: dict[str, Any] = {
    "data": ratings.NAME,
    "precision": "bf16",
    "batch": 8,
    "seq_len": 96,
    "steps": 40,
    "eval_every": 20,
    "eval_batches": 20,
    "checkpoint_every": 0,
    "weight_decay": 0.0,
    "warmup": 0.1,
}
_SMOKE: dict[str, Any] = {"batch": 2, "steps": 2, "eval_every": 1, "eval_batches": 4}
# Adam-mini's authors, github.com/zyushun/Adam-mini, examples/RLHF/training_scripts/reward/run_reward.sh: learning rate
# 2e-5, weight decay 0, one epoch, cosine decay after 10 steps of warm-up, 10 pairs of 1,024 tokens per GPU, two
# accumulated batches, bf16. Betas (0.9, 0.95) are in step2_reward_model_finetuning/main.py, the clipping at 1 in
# dschat/utils/ds_utils.py, two GPUs in README.md, and 60 % of UltraFeedback's rows in --data_split 4,6,0. They start
# from their fine-tuned Llama 2. Assumed: 61,135 rows (the public binarised version), and the start from Llama 2 itself.
_STEPS = 36_681 // 40
REWARD = Workload(
    {**_RUN, "model": RewardModel()},
    {**_SMOKE, "model": RewardModel(width=64)},
    (1e-5, 3e-5, 1e-4),
    full={
        "llama-2-7b": {
            "model": RewardModel("llama-2-7b"),
            "data": "ultrafeedback",
            "batch": 40,
            "seq_len": 1024,
            "steps": _STEPS,
            "eval_every": 20,
            "eval_batches": 25,
            "checkpoint_every": 100,
            "lr": 2e-5,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.0,
            "clip": 1.0,
            "warmup": 10 / _STEPS,
            "decay": "cosine",
            "precision": "bf16",
        }
    },
)
