"""ogbn-arxiv of the Open Graph Benchmark (Hu et al., arXiv 2005.00687): 169,343 papers, their citations and 40 fields.

It is on no package registry, so it was not read here. Its files are read as the benchmark's archive has them.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

from .registry import cache_folder
from .wordnet import Graph, both_ways

ARCHIVE = "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"
NODES, FEATURES, FIELDS = 169_343, 128, 40
"""Sizes of the graph (Hu et al., table 2 and section 4.4)."""
FILES = {"train": "train", "validation": "valid", "test": "test"}
"""Part -> name of the file with its nodes; the split is by year."""


def folder() -> Path:
    """Return where the unpacked archive has to be, outside the repository."""
    return cache_folder() / "ogbn-arxiv" / "arxiv"


@functools.cache
def ogbn_arxiv() -> Graph:
    """Load the graph, with every citation in both directions.

    Raises:
        FileNotFoundError: the archive is not unpacked in the cache folder.
        ValueError: a file has other sizes than the benchmark's.
    """
    names = ["raw/edge", "raw/node-feat", "raw/node-label", *(f"split/time/{name}" for name in FILES.values())]
    paths = [folder() / f"{name}.csv.gz" for name in names]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"ogbn-arxiv is not on this machine ({missing[0]} is missing); on a machine with a connection, get "
            f"{ARCHIVE} and unpack it into {folder().parent}"
        )
    edges, features, labels, *parts = (np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2) for path in paths)
    if features.shape != (NODES, FEATURES) or labels.shape != (NODES, 1) or labels.max() >= FIELDS:
        raise ValueError(
            f"{folder()} has features of shape {features.shape} and labels of shape {labels.shape}, not of {NODES} "
            f"nodes with {FEATURES} features; unpack {ARCHIVE} again"
        )
    content = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()
    return Graph(
        features,
        both_ways({(int(a), int(b)) for a, b in edges}),
        labels[:, 0].astype(np.int64),
        {part: np.sort(nodes[:, 0].astype(np.int64)) for part, nodes in zip(FILES, parts, strict=True)},
        FIELDS,
        content,
    )
