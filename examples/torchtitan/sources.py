"""The sources of Python's standard library as a data set of torchtitan, with a tokenizer."""

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
    """Return the modules of Python's standard library, one document for each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def register() -> str:
    """Register the text as a data set of torchtitan.

    Returns:
        The data set's name.
    """
    from datasets import Dataset

    DATASETS[NAME] = DatasetConfig(
        path=NAME, loader=lambda path: Dataset.from_dict({"text": texts()}), sample_processor=lambda row: row["text"]
    )
    return NAME


def tokenizer(folder: Path, size: int) -> str:
    """Train a byte-level BPE tokenizer on the text, unless the folder already has one.

    Args:
        folder: folder of the tokenizer.
        size: number of tokens, including two special ones and the 256 bytes.

    Returns:
        The folder's path.
    """
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(texts()[::4], vocab_size=size, special_tokens=[BEGIN, END], show_progress=False)
        _write(folder / "tokenizer_config.json", json.dumps({"bos_token": BEGIN, "eos_token": END}))
        _write(folder / "tokenizer.json", trained._tokenizer.to_str())
    return str(folder)


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")  # All ranks may write the file at the same time.
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
