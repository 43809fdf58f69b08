"""The models that reward training begins from: pretrained ones, or small ones of the same architecture for trials."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from experiments.data.registry import cache_folder

from . import smollm
from .libraries import library

HEAD, LAYERS = 64, 2
"""Width of a head, and number of layers, of a policy with random weights."""


@dataclass(frozen=True)
class Policy:
    """A causal language model of transformers.

    Attributes:
        model: the model, fp32.
        tokenizer: its tokenizer, with a chat template.
        fingerprint: hash of its weights, eight hexadecimal digits or more.
    """

    model: nn.Module
    tokenizer: Any
    fingerprint: str


@dataclass(frozen=True)
class Shape:
    """What models of an architecture have in common at every width.

    Attributes:
        hidden: width of the MLP, as a multiple of the model's.
        queries: query heads per key head.
        tied: whether the token embedding is the output layer too.
    """

    hidden: float
    queries: int
    tied: bool


SIZES: Mapping[str, Shape] = MappingProxyType(
    {"smollm2-135m": Shape(1536 / 576, 3, True), "llama-2-7b": Shape(11008 / 4096, 1, False)}
)
"""The policies. SmolLM2-135M is 576 wide with 9 query and 3 key heads; Llama 2-7B is 4096 wide with 32 heads (Touvron
et al., arXiv 2307.09288, and the configuration of its release)."""


def llama_folder() -> Path:
    """Return where the weights of Llama 2-7B are, in transformers' format.

    Raises:
        RuntimeError: they are not there.
    """
    folder = cache_folder() / "Llama-2-7b-chat-hf"
    if not (folder / "config.json").is_file():
        raise RuntimeError(
            f"the weights of Llama 2-7B may not be passed on, so they are not downloaded; accept Meta's licence, put "
            f"the files of meta-llama/Llama-2-7b-chat-hf into {folder}, or try a small model with model.width=128"
        )
    return folder


def load_policy(name: str, width: int, seed: int) -> Policy:
    """Load a policy, or make a small one with random weights.

    Args:
        name: a key of ``SIZES``.
        width: 0 for the policy's own weights, or the width of a small model of its architecture. Its tokens are
            SmolLM2's.
        seed: seed of random weights.

    Raises:
        RuntimeError: a library or the weights are missing, or a hash is wrong.
    """
    transformers = library("transformers", "a policy")
    if name == "llama-2-7b" and not width:
        folder = llama_folder()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 2 has none; what is padded is masked
        return Policy(model.eval(), tokenizer, hashlib.sha256((folder / "config.json").read_bytes()).hexdigest())
    if not width:
        return Policy(*smollm.load(), smollm.FILE_SHA256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm.unquantised(), local_files_only=True)
    model = small(name, width, len(tokenizer), seed)
    return Policy(model, tokenizer, hashlib.sha256(f"{name} {width} {seed}".encode()).hexdigest())


def small(name: str, width: int, vocabulary: int, seed: int) -> nn.Module:
    """Return a model of a policy's architecture with few layers; its weights are a function of the seed.

    Args:
        name: a key of ``SIZES``.
        width: a multiple of ``HEAD``.
        vocabulary: number of tokens.
        seed: seed of the weights.
    """
    transformers = library("transformers", "a policy")
    shape, heads = SIZES[name], width // HEAD
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(width * shape.hidden / HEAD) * HEAD,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // shape.queries),
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()
