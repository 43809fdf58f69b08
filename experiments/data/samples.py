"""Corpora of the first tokens of enwik8, which a run that needs one prepares by itself, in less than a minute.

Their preparation is ``experiments.data.prepare``'s with a limit, so a stopped one goes on. Their fingerprints are
pinned: every machine trains on the same tokens.
"""

from __future__ import annotations

import fcntl
from dataclasses import dataclass

from .prepare import prepare
from .prepared import folder_of, is_prepared, prepared
from .tokenisers import load_tokeniser


@dataclass(frozen=True)
class Sample:
    """The beginning of a source as tokens.

    Attributes:
        tokeniser: name of a pinned tokeniser.
        tokens: number of training tokens at which the preparation stops, after a batch of documents.
        fingerprint: pinned hash of the tokens.
        source: name of the source.
    """

    tokeniser: str
    tokens: int
    fingerprint: str
    source: str = "enwik8"


SAMPLES = {
    "enwik8-gpt2-3m": Sample(
        "gpt2", 3_000_000, "0e4b8bfc7373b68a484d47f70508a677aa1749ce5d6003e075b59dc41b6668c0"
    ),
    "enwik8-mistral-v1-3m": Sample(
        "mistral-v1", 3_000_000, "530aae250a1a83704f6e19b3bf0357575e19aaf4af97b052308fda95268d4a63"
    ),
}  # fmt: skip
"""3.4 and 3.6 million training tokens, and 1.4 and 1.5 million held-out ones, of the pages of enwik8 in their order."""


def prepare_sample(name: str) -> None:
    """Prepare a corpus of ``SAMPLES``, or what is left of it, unless it is prepared.

    The processes that torchrun starts on a machine may all call this: one prepares, and the others wait for it.

    Raises:
        RuntimeError: the tokeniser or the source cannot be downloaded, a library is missing, or the tokens differ from
            the pinned ones.
    """
    sample, folder = SAMPLES[name], folder_of(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_prepared(name):
            prepare(name, sample.source, load_tokeniser(sample.tokeniser), sample.tokens)
    fingerprint = prepared(name).fingerprint
    if fingerprint != sample.fingerprint:
        raise RuntimeError(
            f"{folder} has the fingerprint {fingerprint}, but {sample.fingerprint} is pinned; delete it and start "
            "again. If that does not help, this version of the tokeniser's library splits text in another way"
        )
