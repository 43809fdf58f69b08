"""The graph of WordNet's nouns, from the Debian package ``wordnet-base``: 82,115 nodes of 26 categories.

A node is a noun synset, a set of words of one meaning. Its features come from its gloss, the sentence that explains it,
and its label is the lexicographer file it is in, such as ``noun.animal``. Pointers between two noun synsets (hypernyms,
parts, members, domains, ...) are edges without a type or a direction. Most pointers are hypernyms, and most hypernyms
stay in a category, so 89 % of the edges join two nodes of one label.

The file's offsets are ordered by category. They and the category are in no feature. Parts are drawn by the gloss, so
that synsets with the same gloss are in one part.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .registry import cache_folder

PACKAGE = "wordnet-base"
INSTALLED = Path("/usr/share/wordnet")
SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
"""Pinned hash of ``data.noun`` (version 1:3.0-37 of the package)."""
FIRST_FILE, CATEGORIES = 3, 26
"""Number of the first lexicographer file of nouns, and their number."""
PARTS = ("train", "validation", "test")
_TENTHS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
"""Part of each tenth of the hashes: 60 % for training, 20 % for validation, 20 % for the test."""


@dataclass(frozen=True)
class Graph:
    """A graph with features and labels of its nodes.

    Attributes:
        features: float32 [nodes, words].
        edges: int64 [2, edges], (source, target); every edge occurs in both directions, and no node has one to itself.
        labels: int64 [nodes], from 0.
        parts: part -> indices of its nodes, int64, in ascending order.
        classes: number of labels.
        fingerprint: hash of the data.
    """

    features: np.ndarray
    edges: np.ndarray
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    classes: int
    fingerprint: str


@dataclass(frozen=True)
class Synset:
    """A noun synset: its place in the file, its category from 0, its gloss, and the places it points to."""

    offset: int
    category: int
    gloss: str
    pointers: tuple[int, ...]


def folders() -> list[Path]:
    """Return where the package's files may be: installed, or unpacked below the cache folder."""
    return [INSTALLED, cache_folder() / PACKAGE / INSTALLED.relative_to("/")]


def data_file() -> Path:
    """Return the path of ``data.noun``.

    Raises:
        FileNotFoundError: the Debian package is neither installed nor unpacked in the cache folder.
        ValueError: the file is not the pinned one.
    """
    found = next((folder / "data.noun" for folder in folders() if (folder / "data.noun").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"WordNet is in none of {[str(f) for f in folders()]}; install the Debian package with `apt-get install "
            f"{PACKAGE}`, or unpack it with `apt-get download {PACKAGE}` and `dpkg -x {PACKAGE}_*.deb "
            f"{cache_folder() / PACKAGE}`"
        )
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{found} has sha256 {digest}, but {SHA256} is pinned; install version 1:3.0-37 of {PACKAGE}")
    return found


def parsed(line: str) -> Synset:
    """Read a line of ``data.noun``; its format is in the manual page wndb(5WN).

    Raises:
        ValueError: the line is no noun synset.
    """
    head, bar, gloss = line.partition(" | ")
    words = head.split()
    try:
        after = 4 + 2 * int(words[3], 16)  # words and their numbers come before the pointers
        pointers = [words[after + 1 + 4 * i :][:4] for i in range(int(words[after]))]
        nouns = tuple(int(offset) for _, offset, kind, _ in pointers if kind == "n")
        found = Synset(int(words[0]), int(words[1]) - FIRST_FILE, gloss.strip(), nouns)
    except (IndexError, ValueError) as error:
        raise ValueError(f"{line[:60]!r} is no line of data.noun ({error})") from error
    if not bar or words[2] != "n" or not 0 <= found.category < CATEGORIES:
        raise ValueError(f"{line[:60]!r} is no noun with a gloss and a category from 0 to {CATEGORIES - 1}")
    return found


def edges_of(synsets: Sequence[Synset]) -> np.ndarray:
    """Return the edges, int64 [2, edges], each in both directions, sorted by target and source.

    Raises:
        ValueError: a pointer leads nowhere.
    """
    place = {synset.offset: i for i, synset in enumerate(synsets)}
    try:
        pairs = {(i, place[to]) for i, synset in enumerate(synsets) for to in synset.pointers}
    except KeyError as error:
        raise ValueError(f"a pointer leads to offset {error}, where no synset is") from error
    return both_ways(pairs)


def both_ways(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return pairs of nodes as edges in both directions, each once, int64 [2, edges], sorted by target and source.

    A pair of a node with itself is left out.
    """
    both = {(target, source) for a, b in pairs if a != b for source, target in ((a, b), (b, a))}
    return np.array(sorted(both), dtype=np.int64).reshape(-1, 2).T[::-1].copy()


def bag_of_words(glosses: Sequence[str], words: int) -> np.ndarray:
    """Return tf-idf of the words that occur in the most glosses, each row of length 1, float32 [glosses, words].

    A word is a run of letters, in lower case. Its weight is its count times log(glosses / glosses with it). A gloss
    without any of the words is a row of zeros. Words are chosen on all parts: this uses no label.

    Raises:
        ValueError: the glosses have fewer words.
    """
    found = [Counter(re.findall("[a-z]+", gloss.lower())) for gloss in glosses]
    spread = Counter(word for counts in found for word in counts)
    if words > len(spread):
        raise ValueError(f"words={words} must be at most {len(spread)}, the number of different words")
    chosen = sorted(spread, key=lambda word: (-spread[word], word))[:words]
    column = {word: i for i, word in enumerate(chosen)}
    features = np.zeros((len(glosses), words), dtype=np.float32)
    for row, counts in zip(features, found, strict=True):
        for word, count in counts.items():
            if word in column:
                row[column[word]] = count
    features *= np.log(len(glosses) / np.array([spread[word] for word in chosen], dtype=np.float32))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths > 0, lengths, 1)


def split(glosses: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the nodes of each part. A node's part depends on the hash of its gloss alone.

    Raises:
        ValueError: a part is empty.
    """
    tenths = [hashlib.sha256(gloss.encode()).digest()[0] * 10 // 256 for gloss in glosses]
    part = _TENTHS[tenths]
    parts = {name: np.flatnonzero(part == i) for i, name in enumerate(PARTS)}
    if empty := [name for name, nodes in parts.items() if not len(nodes)]:
        raise ValueError(f"the parts {empty} of {len(glosses)} nodes are empty; use more nodes")
    return parts


@functools.cache
def wordnet(words: int) -> Graph:
    """Load the graph of WordNet's nouns.

    Args:
        words: number of features.

    Raises:
        FileNotFoundError: the Debian package is neither installed nor unpacked in the cache folder.
        ValueError: the file is not the pinned one, or ``words`` is too large.
    """
    lines = data_file().read_text(encoding="utf-8").splitlines()
    synsets = [parsed(line) for line in lines if not line.startswith("  ")]  # the licence is indented
    glosses = [synset.gloss for synset in synsets]
    return Graph(
        bag_of_words(glosses, words),
        edges_of(synsets),
        np.array([synset.category for synset in synsets], dtype=np.int64),
        split(glosses),
        CATEGORIES,
        SHA256,
    )
