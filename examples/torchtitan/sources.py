"""Real text that is always there, as torchtitan takes it: a data set by name, and a tokenizer's folder."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

NAME = "python_sources"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def texts() -> list[str]:
    """The modules of Python's standard library, a document each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def register() -> str:
    """Make the text known to torchtitan.

    Returns:
        the data set's name.
    """
    from datasets import Dataset

    DATASETS[NAME] = DatasetConfig(
        path=NAME, loader=lambda path: Dataset.from_dict({"text": texts()}), sample_processor=lambda row: row["text"]
    )
    return NAME


def tokenizer(folder: Path, size: int) -> str:
    """A folder with a byte-level BPE tokenizer, trained on the text when it is not there yet.

    Args:
        folder: where to keep it.
        size: tokens, two special ones and the 256 bytes included.
    """
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        made = ByteLevelBPETokenizer()
        made.train_from_iterator(texts()[::4], vocab_size=size, special_tokens=[BEGIN, END], show_progress=False)
        _write(folder / "tokenizer_config.json", json.dumps({"bos_token": BEGIN, "eos_token": END}))
        _write(folder / "tokenizer.json", made._tokenizer.to_str())
    return str(folder)


def _write(file: Path, text: str) -> None:
    beside = file.with_suffix(f".{os.getpid()}.tmp")  # every rank may come here at once
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
