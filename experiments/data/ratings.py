"""Sentences and how positive people found them: the ratings of Hutto and Gilbert (VADER, ICWSM 2014).

At least 20 people rated each sentence from -4 (extremely negative) to 4. The sentences come from four places: tweets,
film reviews, product reviews and newspaper editorials. They are in the sdist of the package ``vaderSentiment``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .instructions import BY_HAND, by_hand
from .registry import member
from .splits import held_out_tenth

NAME = "vader-ratings"
PACKAGE = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
SOURCES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
LEAST_DIFFERENCE = 1.0
"""Two sentences whose mean ratings differ by less are no pair, because their order is mostly noise of the raters: the
mean of 20 ratings with a deviation of about 1 has a standard error of 0.2, and a difference of two about 0.3."""


@dataclass(frozen=True)
class Snippet:
    """A sentence, where it comes from, and the mean of its ratings."""

    source: str
    text: str
    rating: float


Pair: TypeAlias = tuple[Snippet, Snippet]
"""The sentence that people found more positive, and the other one."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to a request, and which one people found better. An empty request is the reward model's own."""

    better: str
    worse: str
    request: str = ""


@functools.cache
def comparisons(name: str = NAME) -> tuple[tuple[Comparison, ...], tuple[Comparison, ...]]:
    """Return (training pairs, held-out pairs).

    Args:
        name: ``vader-ratings``, whose pairs are split by sentence, or ``ultrafeedback``, which has to be put into the
            cache folder as ``ultrafeedback/pairs.json``: a list of {"request", "better", "worse"}, split by pair.

    Raises:
        FileNotFoundError: UltraFeedback is not there.
        RuntimeError: a package cannot be downloaded, or a hash is not the pinned one.
        ValueError: the name is unknown, or a split is empty.
    """
    if name not in (NAME, BY_HAND):
        raise ValueError(f"data={name!r} is no set of ratings; use {NAME!r} or {BY_HAND!r}")
    if name == BY_HAND:
        rows = json.loads(by_hand("pairs.json").read_bytes())
        parts = held_out_tenth([Comparison(row["better"], row["worse"], row["request"]) for row in rows])
    else:
        first, second = ([Comparison(b.text, w.text) for b, w in pairs(part)] for part in snippets())
        parts = tuple(first), tuple(second)
    if not all(parts):
        raise ValueError(f"data={name!r} has {len(parts[0])} training and {len(parts[1])} held-out pairs; add pairs")
    return parts


def fingerprint(name: str = NAME) -> str:
    """Return the sha256 of all pairs, in order; the argument and errors are those of ``comparisons``."""
    documents = [[vars(pair) for pair in part] for part in comparisons(name)]
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()


@functools.cache
def snippets() -> tuple[tuple[Snippet, ...], tuple[Snippet, ...]]:
    """Return (training sentences, held-out sentences): a fixed tenth of each source is held out.

    Of sentences that are equal but for case the first one is kept, whatever its source, so none is in both parts.

    Raises:
        RuntimeError: the package cannot be downloaded, or a hash is not the pinned one.
    """
    archive = member(PACKAGE, SDIST_SHA256, FILE, SHA256, needed_by="the reward model")
    unique: dict[str, Snippet] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for source in SOURCES:
            file = tar.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            for line in (file.read() if file else b"").decode().splitlines():
                _, rating, text = line.split("\t")
                unique.setdefault(text.strip().casefold(), Snippet(source, text.strip(), float(rating)))
    parts = [
        held_out_tenth([row for row in unique.values() if row.source == source], stream)
        for stream, source in enumerate(SOURCES)
    ]
    return tuple(r for train, _ in parts for r in train), tuple(r for _, held_out in parts for r in held_out)


def pairs(rows: Sequence[Snippet], least: float = LEAST_DIFFERENCE) -> tuple[Pair, ...]:
    """Pair sentences of the same source at random, the same every time, and return the pairs in random order.

    Every sentence is in one pair at most, so the pairs of held-out sentences are independent.

    Args:
        rows: the sentences.
        least: by how much mean ratings must differ.
    """
    generator = np.random.Generator(np.random.Philox(key=2014, counter=[0, 0, 0, len(rows)]))
    found: list[Pair] = []
    for source in SOURCES:
        own = [row for row in rows if row.source == source]
        order = generator.permutation(len(own))
        for i, j in zip(order[::2], order[1::2], strict=False):
            better, worse = sorted((own[i], own[j]), key=lambda row: -row.rating)
            if better.rating - worse.rating >= least:
                found.append((better, worse))
    return tuple(found[i] for i in generator.permutation(len(found)))
