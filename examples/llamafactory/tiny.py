"""Save a Llama small enough for a CPU, with random weights and a byte-level tokenizer: ``python tiny.py FOLDER``."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]


def make(folder: Path, seed: int = 0) -> None:
    """Create and save the model and the tokenizer.

    Args:
        folder: where to save them.
        seed: seed of the weights.
    """
    texts = (file.read_text("utf-8", "replace") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py")))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=1024, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
