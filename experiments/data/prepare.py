"""Tokenise a corpus once: ``python -m experiments.data.prepare openwebtext --tokenizer gpt2``.

The result is the corpus ``openwebtext-gpt2`` of ``experiments.data.load``: uint16 or uint32 token ids in
``<cache folder>/tokens/openwebtext-gpt2/{train.bin, validation.bin, meta.json}``, each document followed by the
tokeniser's end token. It is written to a folder whose name begins with a dot and is renamed at the end. A preparation
that was stopped continues from its last recorded batch of documents, to the same files and the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.storage import locked, sync_folder, write_json

from .prepared import PARTS, VERSION, folder_of, is_prepared
from .sources import Document, documents
from .tokenisers import Tokeniser, load_tokeniser

logger = logging.getLogger("experiments")
BATCH = 1_024
"""Documents that are tokenised at a time, and after which the progress is recorded. It enters the fingerprint."""


def prepare(
    name: str,
    source: str,
    tokeniser: Tokeniser,
    tokens: int = 0,
    documents_of: Callable[[str, int], Iterator[Document]] = documents,
) -> dict[str, Any]:
    """Tokenise a source, or what is left of it.

    Args:
        name: name of the corpus.
        source: name of the source.
        tokeniser: the tokeniser.
        tokens: stop after the batch of documents in which this many training tokens are reached; 0 for all.
        documents_of: (source, number of documents to skip) -> documents.

    Returns:
        The content of ``meta.json``.

    Raises:
        ValueError: a preparation of this name was begun with other arguments, or a part would have no documents.
    """
    final = folder_of(name)
    work = final.with_name(f".{name}.partial")
    if is_prepared(name):
        logger.info("%s is prepared: nothing to do", final)
        return dict(json.loads((final / "meta.json").read_text(encoding="utf-8")))
    identity = {
        "source": source,
        "tokeniser": tokeniser.name,
        "tokeniser_sha256": tokeniser.sha256,
        "limit": tokens,
        "vocab": tokeniser.vocab,
        "dtype": tokeniser.dtype.name,
        "batch": BATCH,
        "version": VERSION,
    }
    with locked(work):
        progress = _resume(work, identity)
        with tqdm(desc=name, unit=" tokens", unit_scale=True, initial=progress["tokens"]["train"]) as bar:
            rest = documents_of(source, progress["documents"])
            while batch := list(islice(rest, BATCH)):
                if tokens and progress["tokens"]["train"] >= tokens:
                    break
                bar.update(_append(work, batch, tokeniser, progress))
                write_json(work / "progress.json", {"identity": identity, "progress": progress})
        if missing := [part for part in PARTS if not progress["tokens"][part]]:
            raise ValueError(f"source={source!r} gave no documents for {missing[0]}; increase tokens={tokens}")
        meta = {**identity, **progress}
        write_json(work / "meta.json", meta)
    sync_folder(work)
    os.replace(work, final)
    sync_folder(final.parent)
    return meta


def _resume(work: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded progress, and cut the files to it: what was written after the record is written again."""
    fresh = {"documents": 0, "tokens": dict.fromkeys(PARTS, 0), "fingerprint": hashlib.sha256(b"").hexdigest()}
    record, progress = work / "progress.json", fresh
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["identity"] != identity:
            different = {key: stored["identity"].get(key) for key, value in identity.items()
                         if stored["identity"].get(key) != value}  # fmt: skip
            raise ValueError(f"{work} was begun with {different}; repeat those arguments, or delete the folder")
        progress = stored["progress"]
        logger.info("continuing after %d documents", progress["documents"])
    size = np.dtype(identity["dtype"]).itemsize
    for part in PARTS:
        with (work / f"{part}.bin").open("ab") as file:
            file.truncate(progress["tokens"][part] * size)
    return dict(progress)


def _append(work: Path, batch: list[Document], tokeniser: Tokeniser, progress: dict[str, Any]) -> int:
    """Tokenise a batch and append it to the files; update the progress, and return the number of training tokens."""
    encoded = tokeniser.encode([document.text for document in batch])
    new = {}
    digest = hashlib.sha256(progress["fingerprint"].encode())
    for part in PARTS:
        held_out = part == "validation"
        pieces = [np.asarray([*ids, tokeniser.end], tokeniser.dtype)
                  for ids, document in zip(encoded, batch, strict=True) if document.validation == held_out]  # fmt: skip
        content = b"".join(piece.tobytes() for piece in pieces)
        with (work / f"{part}.bin").open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digest.update(hashlib.sha256(content).digest())
        new[part] = sum(len(piece) for piece in pieces)
    progress["documents"] += len(batch)
    progress["tokens"] = {part: progress["tokens"][part] + new[part] for part in PARTS}
    progress["fingerprint"] = digest.hexdigest()
    return new["train"]


def main(source: tyro.conf.Positional[str], tokenizer: str = "gpt2", tokens: int = 0, name: str = "") -> None:
    """Tokenise a corpus once, for experiments.data.load.

    Args:
        source: openwebtext, c4 (both need a connection and the library datasets) or enwik8.
        tokenizer: gpt2, mistral-v1, or the path of a SentencePiece .model or a tokenizers .json file.
        tokens: stop once there are this many training tokens; 0 for all. C4 has 156 billion: give the largest number
            that a recipe needs (docs/gpu.md).
        name: name of the corpus; by default source-tokenizer.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with refusals(ValueError, OSError, RuntimeError):
        if tokens < 0:
            raise ValueError(f"tokens={tokens} must be at least 0; 0 takes all")
        tokeniser = load_tokeniser(tokenizer)
        meta = prepare(name or f"{source}-{tokeniser.name}", source, tokeniser, tokens)
    counts = ", ".join(f"{meta['tokens'][part]:,} for {part}" for part in PARTS)
    folder = folder_of(name or f"{source}-{tokeniser.name}")
    print(f"{folder}: {counts} ({meta['dtype']}, {meta['documents']:,} documents)")


if __name__ == "__main__":
    tyro.cli(main)
