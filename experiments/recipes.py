"""The training recipes of the Adam-mini paper, for machines with GPUs. None of them was run here (docs/gpu.md).

Sources, by the letter that each recipe names:

    P  Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv 2406.16793
    A  the configuration files that its authors published: github.com/zyushun/Adam-mini, gpt2/config/train_gpt2_*.py in
       their first versions (100,000 iterations), examples/llama/train_configs/*.toml and
       examples/llama/torchtitan/models/llama/__init__.py
    N  nanoGPT, from which the GPT-2 code of A comes, and T torchtitan, from which the Llama code comes: their defaults
       where A sets nothing

What is not taken over: windows are drawn with replacement from one token file, for T's stream of documents too; the
Llama corpus is tokenised with a public vocabulary of the same size (32,000) as Llama 2's; T's initial weights differ by
layer, ours are GPT-2's for both families. Arms differ in the optimizer alone, so these hold for all of them alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.configs import TrainConfig
from experiments.models import GPTConfig, LlamaConfig

GPT2_BATCH, GPT2_LENGTH = 480, 1024
"""Sequences per step and tokens per sequence of GPT-2: 491,520 tokens per iteration (A)."""
LLAMA_BATCH, LLAMA_LENGTH = 256, 512
"""Sequences per step and tokens per sequence of the Llamas up to 1B: 131,072 tokens per step (A, P)."""


def _gpt2(name: str, layers: int, heads: int, width: int, lr: float, min_lr: float) -> TrainConfig:
    """A GPT-2 on OpenWebText.

    A: 100,000 iterations of 491,520 tokens, 2,000 of them warm-up, cosine decay to ``min_lr``; betas (0.9, 0.95), clip
    1, no dropout, no biases. P: weight decay 0.1 (A's file of the smallest model has 0, with 0.1 in a comment). N:
    50,257 tokens padded to 50,304, tied embeddings, weights of standard deviation 0.02, bf16 autocast. Ours: how often
    and on how many sequences the validation loss is taken (4 x 480, every 1,000 steps).
    """
    model = GPTConfig(
        vocab=50_304,
        block_size=GPT2_LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        tied=True,
        bias=False,
        init="gpt2",
    )
    return TrainConfig(
        name,
        model,
        data="openwebtext-gpt2",
        lr=lr,
        weight_decay=0.1,
        clip=1.0,
        warmup=2_000 / 100_000,
        batch=GPT2_BATCH,
        seq_len=GPT2_LENGTH,
        steps=100_000,
        eval_every=1_000,
        eval_batches=4,
        checkpoint_every=1_000,
        precision="bf16",
        decay="cosine",
        lr_end=min_lr / lr,
    )


def gpt2_125m() -> TrainConfig:
    """GPT-2 125M (A: train_gpt2_small.py; P: lr 6e-4)."""
    return _gpt2("gpt2_125m", 12, 12, 768, 6e-4, 3e-5)


def gpt2_330m() -> TrainConfig:
    """GPT-2 330M, elsewhere called medium or 355M (A: train_gpt2_medium.py; P: lr 3e-4)."""
    return _gpt2("gpt2_330m", 24, 16, 1024, 3e-4, 6e-5)


def gpt2_1b5() -> TrainConfig:
    """GPT-2 1.5B (A: train_gpt2_xl.py; P: lr 1e-4)."""
    return _gpt2("gpt2_1b5", 48, 25, 1600, 1e-4, 1e-5)


def _llama(name: str, dim: int, layers: int, heads: int, hidden: int, steps: int, lr: float) -> TrainConfig:
    """A Llama 2 of the paper's scaling law, on C4.

    A: width, layers and heads; 256 sequences of 512 tokens; the number of steps, about 26 tokens per parameter; 1 % of
    them warm-up; clip 1. ``hidden`` follows from the width as in Meta's code: two thirds of four widths, rounded up to
    a multiple of 256. P: lr (6e-4, and 2e-4 for 1B), betas (0.9, 0.95), weight decay 0.1. T: linear decay to 0, bf16
    parameters for products, gradients reduced in fp32. Ours: the validation (8 x 256 sequences, every 200 steps).
    """
    model = LlamaConfig(32_000, dim, layers, heads, heads, hidden, init="gpt2")
    return TrainConfig(
        name,
        model,
        data="c4-mistral-v1",
        lr=lr,
        weight_decay=0.1,
        clip=1.0,
        warmup=0.01,
        batch=LLAMA_BATCH,
        seq_len=LLAMA_LENGTH,
        steps=steps,
        eval_every=200,
        eval_batches=8,
        checkpoint_every=500,
        precision="bf16",
    )


def llama_39m() -> TrainConfig:
    """Llama 39M, 1.0 billion tokens."""
    return _llama("llama_39m", 384, 8, 6, 1024, 7_800, 6e-4)


def llama_67m() -> TrainConfig:
    """Llama 67M, 1.8 billion tokens."""
    return _llama("llama_67m", 512, 10, 8, 1536, 13_400, 6e-4)


def llama_102m() -> TrainConfig:
    """Llama 102M, 2.7 billion tokens."""
    return _llama("llama_102m", 640, 12, 10, 1792, 20_400, 6e-4)


def llama_162m() -> TrainConfig:
    """Llama 162M, 4.2 billion tokens."""
    return _llama("llama_162m", 768, 16, 12, 2048, 32_400, 6e-4)


def llama_271m() -> TrainConfig:
    """Llama 271M, 7.1 billion tokens; A writes its warm-up (542 steps), which is 1 % of 54,200."""
    return _llama("llama_271m", 1024, 16, 16, 2816, 54_200, 6e-4)


def llama_1b() -> TrainConfig:
    """Llama 1B, 26 billion tokens."""
    return _llama("llama_1b", 2048, 18, 16, 5632, 200_000, 2e-4)


def _large(name: str, model: LlamaConfig, data: str) -> TrainConfig:
    """A Llama of 7 billion parameters or more: its sizes, and a run of A's length.

    A (13B and 8B): lr 1e-4, sequences of 2,048 tokens, two per GPU, 10,000 steps, 100 of them warm-up. Assumed: 64
    GPUs, hence 128 sequences per step; the same for 7B; the other numbers as in the smaller Llamas.
    """
    return dataclasses.replace(
        llama_1b(), experiment=name, model=model, data=data, lr=1e-4, batch=128, seq_len=2048, steps=10_000
    )


def llama2_7b() -> TrainConfig:
    """Llama 2-7B (sizes: Touvron et al., arXiv 2307.09288)."""
    return _large("llama2_7b", LlamaConfig(32_000, 4096, 32, 32, 32, 11_008, init="gpt2"), "c4-mistral-v1")


def llama2_13b() -> TrainConfig:
    """Llama 2-13B (sizes: Touvron et al., arXiv 2307.09288)."""
    return _large("llama2_13b", LlamaConfig(32_000, 5120, 40, 40, 40, 13_824, init="gpt2"), "c4-mistral-v1")


def llama3_8b() -> TrainConfig:
    """Llama 3-8B (sizes: Grattafiori et al., arXiv 2407.21783); its tokeniser's file is needed for the preparation."""
    model = LlamaConfig(128_256, 4096, 32, 32, 8, 14_336, rope_base=500_000.0, init="gpt2")
    return _large("llama3_8b", model, "c4-llama3")


TRAINED: dict[str, Callable[[], TrainConfig]] = {
    "gpt2-125m": gpt2_125m,
    "gpt2-330m": gpt2_330m,
    "gpt2-1.5b": gpt2_1b5,
    "llama-39m": llama_39m,
    "llama-67m": llama_67m,
    "llama-102m": llama_102m,
    "llama-162m": llama_162m,
    "llama-271m": llama_271m,
    "llama-1b": llama_1b,
}
"""The recipes of the profile ``gpu``."""
LARGE: dict[str, Callable[[], TrainConfig]] = {
    "llama2-7b": llama2_7b,
    "llama2-13b": llama2_13b,
    "llama3-8b": llama3_8b,
}
"""Larger sizes, which the profile runs only by name."""
RECIPES = TRAINED | LARGE

DIVISOR = 16
"""By how much ``reduced`` divides widths and vocabularies; it divides all of the recipes'."""


def reduced(config: TrainConfig) -> TrainConfig:
    """Return a recipe at a size that a CPU trains in a second, through the same code.

    The width, the feed-forward width and the vocabulary are divided by 16; heads, key-value heads, kinds of layers,
    biases, tied embeddings, initial weights, rotary base, optimizer, schedule and precision stay. There are two layers,
    sequences of 32 tokens, four per step, two steps with a warm-up of one, one validation batch, and the text of
    Python's standard library.
    """
    model: Any = config.model
    smaller = {"vocab": model.vocab // DIVISOR}
    if isinstance(model, GPTConfig):
        smaller |= {"n_embd": model.n_embd // DIVISOR, "n_layer": 2, "block_size": 32}
    else:
        smaller |= {"dim": model.dim // DIVISOR, "hidden": model.hidden // DIVISOR, "n_layers": 2}
    run = {"batch": 4, "seq_len": 32, "steps": 2, "warmup": 0.5, "eval_every": 2, "eval_batches": 1}
    return dataclasses.replace(
        config,
        experiment=f"reduced_{config.experiment}",
        model=dataclasses.replace(model, **smaller),
        data="python-stdlib",
        checkpoint_every=0,
        **run,
    )
