"""Supervised fine-tuning with TRL's SFTTrainer: all weights of SmolLM2-135M or LoRA adapters, on 900 instructions.

Rows are in the model's chat template, and the loss is that of the answers' tokens alone. TRL packs several rows into a
sequence (best-fit decreasing). Packed rows do not attend to each other: their positions start at 0 again, from which
transformers makes a mask of blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import instructions as rows_of

from .bases import Base, Pretrained, load_base, require_base
from .libraries import library
from .workload import Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.interruption import Interruption
    from experiments.tasks import Casting
    from experiments.train import Options

    from .trl_loop import TrainerLoop

LEAST_ANSWER = 32
"""Tokens of an answer that must fit. A row whose question leaves less room is left out; longer answers are cut."""
IGNORED = -100
"""Label of a token that is not predicted, as in torch and transformers."""
EVALUATED = 8
"""Held-out rows per forward pass."""
SHOWN, SHOWN_TOKENS = 3, 40
"""Held-out questions whose greedy answers a run of seed 0 leaves, and their length in tokens."""


@dataclass(frozen=True)
class FineTuning:
    """Supervised fine-tuning of a language model.

    Attributes:
        base: the pretrained model.
        lora_rank: rank of the LoRA adapters of all linear layers; 0 to train all weights.
        lora_alpha: the adapters' product is multiplied by ``lora_alpha / lora_rank``.
        width: width of a model with random weights in place of the pretrained one; 0 for the pretrained one.
    """

    base: Base = "smollm2"
    lora_rank: int = 0
    lora_alpha: int = 16
    width: int = 0

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: the base is unknown, or a number is out of range.
        """
        require_base(self.base, self.width)
        for name, least in (("lora_rank", 0), ("lora_alpha", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")

    def fetch(self, config: TrainConfig) -> None:
        """Check that libraries, weights and rows are there, and download what is missing.

        Raises:
            FileNotFoundError: rows or weights have to be put into the cache folder by hand.
            RuntimeError: a library is missing, or a package cannot be had or is not the pinned one.
            ValueError: the data is unknown, or the sequences are longer than the model's context.
        """
        for name in ("trl", "datasets", *(("peft",) if self.lora_rank else ())):
            library(name, "fine-tuning")
        rows_of.instructions(config.data)
        require_context(config.seq_len, load_base(self.base, self.width, seed=config.seed))

    @staticmethod
    def loop(config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> TrainerLoop:
        """Return the loop that trains it."""
        from .trl_loop import TrainerLoop

        return TrainerLoop(config, folder, options, interruption, Instructing(config, config.model))


def require_context(length: int, base: Pretrained) -> None:
    """Check that sequences fit a model.

    Raises:
        ValueError: they do not.
    """
    if length > base.context:
        raise ValueError(f"seq_len={length} must be at most {base.context}, the model's context")


def tokenised(rows: Sequence[rows_of.Instruction], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Return rows as tokens of the chat template, and labels for the tokens of the answers.

    Args:
        rows: questions and answers.
        tokenizer: the model's tokenizer.
        length: tokens at which a row is cut. A row whose question leaves less than ``LEAST_ANSWER`` is left out.

    Returns:
        ``input_ids`` and ``labels`` of each row.

    Raises:
        ValueError: no row is left, or the chat template writes a question differently when an answer follows.
    """
    found = []
    for row in rows:
        question = [{"role": "user", "content": row.question}]
        chat = [*question, {"role": "assistant", "content": row.answer}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        both = tokenizer.apply_chat_template(chat, return_dict=False)
        if both[: len(prompt)] != prompt:
            raise ValueError("the chat template changes a question that is answered; use another tokenizer")
        if len(prompt) + LEAST_ANSWER <= length:
            labels = [*[IGNORED] * len(prompt), *both[len(prompt) :]]
            found.append({"input_ids": both[:length], "labels": labels[:length]})
    if not found:
        raise ValueError(
            f"seq_len={length} leaves no row of {len(rows)}: a question and {LEAST_ANSWER} tokens must fit; increase it"
        )
    return found


class Instructing:
    """Fine-tuning on instructions: the loss of answers' tokens on held-out rows, and its exponential (perplexity).

    Args:
        config: the run.
        kind: what is trained.

    Raises:
        ValueError: the data is unknown, a split is empty, or the sequences are longer than the model's context.
    """

    def __init__(self, config: TrainConfig, kind: FineTuning) -> None:
        base = load_base(kind.base, kind.width, seed=config.seed)
        require_context(config.seq_len, base)
        self.config, self.kind, self.tokenizer = config, kind, base.tokenizer
        self.model = adapted(base.model, kind, config.seed)
        train, self.held_out_rows = rows_of.instructions(config.data)
        rows = tokenised(train, base.tokenizer, config.seq_len)
        held_out = tokenised(self.held_out_rows, base.tokenizer, config.seq_len)
        self.held_out = sorted(held_out[: config.eval_batches * config.batch], key=lambda row: len(row["input_ids"]))
        self.fingerprint = hashlib.sha256(json.dumps([rows, held_out, base.fingerprint]).encode()).hexdigest()
        data = library("datasets", "fine-tuning").Dataset.from_list(rows)
        self.packed = library("trl", "fine-tuning").pack_dataset(data, config.seq_len, "bfd")
        self.examples = len(self.packed)

    def trainer(self, rows: list[int], arguments: dict[str, Any], **options: Any) -> Any:
        """Return TRL's trainer of packed rows."""
        trl = library("trl", "fine-tuning")
        args = trl.SFTConfig(
            **arguments,
            max_length=None,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenised and packed
        )
        data = self.packed.select(rows)
        return trl.SFTTrainer(self.model, args, train_dataset=data, processing_class=self.tokenizer, **options)

    @torch.no_grad()
    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return the mean loss per token of held-out answers in nats, and its exponential."""
        loss = held_out_loss(self.model, self.held_out, rows or EVALUATED, casting)
        return {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    @torch.no_grad()
    def artefacts(self, *, casting: Casting) -> dict[str, Any]:
        """Return answers of the trained and of the untrained model to held-out questions, for seed 0."""
        if self.config.seed:
            return {}
        untrained = load_base(self.kind.base, self.kind.width, seed=self.config.seed).model
        untrained = untrained.to(next(self.model.parameters()).device)
        shown = self.held_out_rows[:SHOWN]
        questions = [[{"role": "user", "content": row.question}] for row in shown]
        before, after = (self._answers(model, questions, casting) for model in (untrained, self.model))
        samples = [
            {"question": row.question, "before": b, "after": a} for row, b, a in zip(shown, before, after, strict=True)
        ]
        loss = held_out_loss(untrained, self.held_out, EVALUATED, casting)
        return {"samples": {"untrained_val_loss": loss, "answers": samples}}

    def _answers(self, model: nn.Module, questions: list[Any], casting: Casting) -> list[str]:
        """Return the greedy answers to questions, one after another, so that none depends on padding."""
        tokenizer, found, training = self.tokenizer, [], model.training
        model.eval()
        for question in questions:
            prompt = tokenizer.apply_chat_template(
                question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(next(model.parameters()).device)
            with casting():
                tokens = model.generate(**prompt, do_sample=False, max_new_tokens=SHOWN_TOKENS, use_cache=True)
            answer = tokens[0, prompt["input_ids"].shape[1] :]
            found.append(tokenizer.decode(answer, skip_special_tokens=True))
        model.train(training)
        return found


def adapted(model: nn.Module, kind: FineTuning, seed: int) -> nn.Module:
    """Return a model whose LoRA adapters alone are trained, or the model itself if the rank is 0."""
    if not kind.lora_rank:
        return model
    peft = library("peft", "LoRA")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"r": kind.lora_rank, "lora_alpha": kind.lora_alpha, "lora_dropout": 0.0}
        return peft.get_peft_model(model, peft.LoraConfig(**sizes, target_modules="all-linear", task_type="CAUSAL_LM"))


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows as int64 [n, longest], filled with a value on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Sequence[dict[str, list[int]]], rows: int, casting: Casting) -> float:
    """Return the mean cross entropy in nats over all tokens of held-out answers.

    Args:
        model: maps tokens and their mask to logits.
        held_out: ``input_ids`` and ``labels`` of each row.
        rows: rows per forward pass.
        casting: returns the context of a forward pass.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(held_out), rows):
        part = held_out[start : start + rows]
        tokens = padded([row["input_ids"] for row in part], 0).to(device)
        labels = padded([row["labels"] for row in part], IGNORED).to(device)
        mask = padded([[1] * len(row["input_ids"]) for row in part], 0).to(device)
        with casting():
            logits = model(input_ids=tokens, attention_mask=mask).logits
        wanted = labels[:, 1:] != IGNORED
        total += F.cross_entropy(logits[:, :-1][wanted].float(), labels[:, 1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    model.train(training)
    return total / count


_RUN: dict[str, Any] = {
    "data": rows_of.NAME,
    "precision": "bf16",
    "batch": 4,
    "seq_len": 256,
    "steps": 30,
    "eval_every": 15,
    "eval_batches": 12,
    "checkpoint_every": 0,
    "weight_decay": 0.0,
    "warmup": 0.1,
}
_SMOKE: dict[str, Any] = {"batch": 2, "steps": 2, "eval_every": 1, "eval_batches": 2, "seq_len": 128}
# Adam-mini's authors, github.com/zyushun/Adam-mini, examples/RLHF/training_scripts/sft/run_sft_full.sh and (in an
# earlier version) RLHF/training_scripts/sft/run_sft_lora.sh: learning rate 2e-6, weight decay 0, 3 epochs, cosine decay
# after 10 steps of warm-up, 20 sequences of 1,024 tokens per GPU, bf16; LoRA has rank 128, two accumulated batches, and
# a product multiplied by 1/128 (dschat/utils/module/lora.py). Betas (0.9, 0.95) are in step1_supervised_finetuning/
# main.py, the clipping at 1 in dschat/utils/ds_utils.py, two GPUs in README.md, and 40 % of the rows of UltraFeedback
# in --data_split 4,6,0. Assumed: 61,135 rows (the public binarised version), and as many steps as rows without
# packing take, though rows are packed here.
_FULL: dict[str, Any] = {
    "data": "ultrafeedback",
    "batch": 40,
    "seq_len": 1024,
    "steps": 3 * 24_454 // 40,
    "eval_every": 20,
    "eval_batches": 25,
    "checkpoint_every": 100,
    "lr": 2e-6,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "clip": 1.0,
    "warmup": 10 / (3 * 24_454 // 40),
    "decay": "cosine",
    "precision": "bf16",
}
SFT = Workload(
    {**_RUN, "model": FineTuning()},
    {**_SMOKE, "model": FineTuning(width=64)},
    (1e-5, 3e-5, 1e-4),
    full={"llama-2-7b": {**_FULL, "model": FineTuning("llama-2-7b")}},
)
SFT_LORA = Workload(
    {**_RUN, "model": FineTuning(lora_rank=16, lora_alpha=16)},
    {**_SMOKE, "model": FineTuning(lora_rank=4, width=64)},
    (1e-4, 3e-4, 1e-3),
    full={
        "llama-2-7b": {
            **_FULL,
            "batch": 80,
            "steps": 3 * 24_454 // 80,
            "warmup": 10 / (3 * 24_454 // 80),
            "model": FineTuning("llama-2-7b", lora_rank=128, lora_alpha=1),
        }
    },
)
