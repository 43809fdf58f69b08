"""Texts to tokenise: documents in a fixed order, each for training or validation.

enwik8       95 million bytes of the dump, cut at its pages; split as in ``data.enwik8``, held-out pages first
openwebtext  8 million web pages (9 billion GPT-2 tokens), through Hugging Face ``datasets``; as nanoGPT holds out
             one document in 2,000 at random, every 2,000th is held out here
c4           the English Colossal Clean Crawled Corpus with its own validation split, streamed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .enwik8 import enwik8

HELD_OUT = 2_000
"""One of this many documents of a source without a validation split is held out."""
VALIDATION_DOCUMENTS = 16_384
"""Documents of C4's validation split that are taken, 7 million tokens; they come first."""


@dataclass(frozen=True)
class Document:
    """A text, and whether it is held out."""

    text: str
    validation: bool = False


def documents(source: str, skip: int = 0) -> Iterator[Document]:
    """Yield the documents of a source, in the same order every time.

    Args:
        source: a key of ``SOURCES``.
        skip: number of documents to leave out at the beginning.

    Raises:
        ValueError: the source is unknown.
        RuntimeError: ``datasets`` is not installed, or the source cannot be reached.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; choose one of {sorted(SOURCES)}")
    return SOURCES[source](skip)


def _enwik8(skip: int) -> Iterator[Document]:
    corpus = enwik8()
    for validation, tokens in ((True, corpus.validation), (False, corpus.train)):
        for page in tokens.tobytes().split(b"</page>\n"):
            if skip:
                skip -= 1
                continue
            yield Document(page.decode("utf-8", errors="replace"), validation)


def _stream(source: str, path: str, name: str | None, split: str) -> Any:
    """Open a split of a Hugging Face dataset as a stream of records with a ``text``."""
    try:
        import datasets
    except ImportError:
        raise RuntimeError(
            f"source={source!r} needs the library datasets; install it with `pip install 'adam-mini-lab[data]'`, on a "
            "machine with a connection, or prepare 'enwik8'"
        ) from None
    try:
        return datasets.load_dataset(path, name, split=split, streaming=True)
    except Exception as error:  # the library raises its own and those of several others
        raise RuntimeError(
            f"source={source!r}: {path} cannot be opened ({type(error).__name__}: {str(error)[:300]}); run this on a "
            "machine with a connection to huggingface.co, and copy the cache folder"
        ) from error


def _openwebtext(skip: int) -> Iterator[Document]:
    records = _stream("openwebtext", "Skylion007/openwebtext", None, "train")
    for i, record in enumerate(records.skip(skip) if skip else records, start=skip):
        yield Document(record["text"], i % HELD_OUT == HELD_OUT - 1)


def _c4(skip: int) -> Iterator[Document]:
    if skip < VALIDATION_DOCUMENTS:
        held_out = _stream("c4", "allenai/c4", "en", "validation")
        for record in islice(held_out, skip, VALIDATION_DOCUMENTS):
            yield Document(record["text"], validation=True)
    records, left = _stream("c4", "allenai/c4", "en", "train"), max(0, skip - VALIDATION_DOCUMENTS)
    for record in records.skip(left) if left else records:
        yield Document(record["text"])


SOURCES = {"enwik8": _enwik8, "openwebtext": _openwebtext, "c4": _c4}
