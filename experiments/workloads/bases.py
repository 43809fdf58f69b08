"""The pretrained language models that workloads fine-tune: SmolLM2-135M here, and Llama 2-7B at full size.

A base at reduced width has random weights, the architecture of the base and SmolLM2's tokens: it checks code and
settings, and learns nothing of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from experiments.data.registry import cache_folder
from optimizer.tools.architectures import facts

from . import smollm
from .libraries import library

Base = Literal["smollm2", "llama-2-7b"]
BASES: tuple[Base, ...] = ("smollm2", "llama-2-7b")
HEAD = 32
"""Width of an attention head at reduced width."""
PLAIN_CHAT = (
    "{% for message in messages %}{{ 'Human: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{{ message['content'] + ('' if message['role'] == 'user' else eos_token) + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""Conversations for a tokenizer without a chat template of its own, such as Llama 2's."""


@dataclass(frozen=True)
class Pretrained:
    """A model, its tokenizer, and a hash or name of its weights."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str

    @property
    def context(self) -> int:
        """Longest sequence that the model takes."""
        return int(self.model.config.max_position_embeddings)


def require_base(base: str, width: int) -> None:
    """Check the fields of a config that name a base.

    Raises:
        ValueError: the base is unknown, or the width is no number of heads.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r} is unknown; choose from {BASES}")
    if isinstance(width, bool) or not isinstance(width, int) or width < 0 or width % HEAD:
        raise ValueError(f"width={width!r} must be a multiple of {HEAD}, the width of a head; 0 for the base's weights")


def load_base(base: Base, width: int, *, seed: int, scalar: bool = False) -> Pretrained:
    """Load a pretrained model in fp32, or build it at reduced width.

    Args:
        base: whose weights or architecture.
        width: width of the hidden layers of a reduced model with two layers; 0 for the pretrained weights.
        seed: seed of the weights that are not pretrained.
        scalar: whether the model gives one number for a sequence, by a new head without bias, instead of tokens.

    Raises:
        FileNotFoundError: the weights of Llama 2 are not there.
        RuntimeError: a library is missing, or SmolLM2's package cannot be had or is not the pinned one.
    """
    transformers = library("transformers", "a pretrained model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if width:
            tokenizer, config = smollm.load_tokenizer(), reduced(base, width)
            model = _of(transformers, scalar).from_config(config, attn_implementation="sdpa")
            return Pretrained(_ready(model, tokenizer), tokenizer, f"{base}-{width}")
        folder = smollm.unquantised() if base == "smollm2" else llama_folder()
        options: dict[str, Any] = {"dtype": "float32", "attn_implementation": "sdpa", "local_files_only": True}
        options |= {"num_labels": 1} if scalar else {}
        model = _of(transformers, scalar).from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return Pretrained(_ready(model, tokenizer), tokenizer, smollm.FILE_SHA256 if base == "smollm2" else base)


def _of(transformers: Any, scalar: bool) -> Any:
    return transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM


def _ready(model: nn.Module, tokenizer: Any) -> nn.Module:
    """Prepare a tokenizer and a model's config for training; return the model in eval mode."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN_CHAT
    config: Any = model.config
    config.use_cache, config.pad_token_id = False, tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; use the model's own tokenizer"
        )
    return model.eval()


def reduced(base: Base, width: int) -> Any:
    """Return transformers' config of a base at reduced width: two layers, and the base's ratio of heads."""
    llama = library("transformers", "a pretrained model").LlamaConfig
    own: dict[str, Any] = facts("llama-2-7b")["config"] if base == "llama-2-7b" else smollm.configuration()
    heads = width // HEAD
    shared = own["num_attention_heads"] // own["num_key_value_heads"]
    return llama(
        vocab_size=smollm.configuration()["vocab_size"],
        hidden_size=width,
        intermediate_size=round(own["intermediate_size"] / own["hidden_size"] * width / 8) * 8,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // shared),
        max_position_embeddings=own["max_position_embeddings"],
        tie_word_embeddings=own["tie_word_embeddings"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        num_labels=1,
    )


def llama_folder() -> Path:
    """Return the folder of Llama 2-7B's weights, which its licence lets nobody pass on.

    Raises:
        FileNotFoundError: they are not there.
    """
    folder = cache_folder() / "Llama-2-7b-hf"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"base='llama-2-7b' needs the files of meta-llama/Llama-2-7b-hf in {folder}; accept Meta's licence and put "
            "them there, or check the settings with a width of 64"
        )
    return folder
