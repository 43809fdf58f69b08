"""A fixed split of rows into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def held_out_tenth(rows: Sequence[Row], stream: int = 0) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return (training rows, held-out rows): a random tenth, the same at every call, rounded down.

    Args:
        rows: what is split.
        stream: number of the random order, for sets of rows that should not be split alike.
    """
    order = np.random.Generator(np.random.Philox(key=2406_16793, counter=[0, 0, 0, stream])).permutation(len(rows))
    held_out = len(rows) // 10
    return tuple(rows[i] for i in order[held_out:]), tuple(rows[i] for i in order[:held_out])
