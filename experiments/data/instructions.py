"""Instructions and answers in English: the demonstration rows of LLaMA-Factory, from a pinned sdist."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .registry import cache_folder, member
from .splits import held_out_tenth

NAME = "alpaca-en-demo"
PACKAGE = "llamafactory==0.9.5"
BY_HAND = "ultrafeedback"
SDIST_SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
FILE = "data/alpaca_en_demo.json"
SHA256 = "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"


@dataclass(frozen=True)
class Instruction:
    """An instruction with its input, if it has one, and the answer to it."""

    question: str
    answer: str


@functools.cache
def instructions(name: str = NAME) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """Return (training rows, held-out rows), the same tenth held out every time.

    Of rows with the same question the first one is kept, so that no question is in both parts.

    Args:
        name: ``alpaca-en-demo``, 999 rows of a pinned package, or ``ultrafeedback``, which has to be put into the cache
            folder as ``ultrafeedback/instructions.json``: a list of {"instruction", "input", "output"}.

    Raises:
        FileNotFoundError: UltraFeedback is not there.
        ValueError: the name is unknown, or there are fewer than ten rows.
        RuntimeError: the package cannot be downloaded, or a hash is not the pinned one.
    """
    if name not in (NAME, BY_HAND):
        raise ValueError(f"data={name!r} is no set of instructions; use {NAME!r} or {BY_HAND!r}")
    if name == BY_HAND:
        rows = json.loads(by_hand("instructions.json").read_bytes())
    else:
        rows = json.loads(member(PACKAGE, SDIST_SHA256, FILE, SHA256, needed_by="fine-tuning on instructions"))
    unique: dict[str, Instruction] = {}
    for row in rows:
        question = f"{row['instruction']}\n{row['input']}".strip()
        unique.setdefault(question, Instruction(question, row["output"].strip()))
    kept = [row for row in unique.values() if row.answer]
    if len(kept) < 10:
        raise ValueError(f"data={name!r} has {len(kept)} rows with an answer, and a tenth is held out; add rows")
    return held_out_tenth(kept)


def by_hand(file: str) -> Path:
    """Return the path of a file of UltraFeedback, which no package has.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = cache_folder() / BY_HAND / file
    if not path.is_file():
        raise FileNotFoundError(
            f"data={BY_HAND!r} needs {path}; write it from openbmb/UltraFeedback (docs/workloads.md)"
        )
    return path
