"""Maps of block norms, and spectra of single blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .numbers import Number, ratio
from .study import HEAD_ROLES


@dataclass(frozen=True)
class BlockMap:
    """Squared norms of the blocks of a map.

    Attributes:
        labels: names of the blocks.
        mean: [blocks, blocks].
        stderr: [blocks, blocks].
        sizes: parameters of each block.
    """

    labels: list[str]
    mean: np.ndarray
    stderr: np.ndarray
    sizes: np.ndarray

    @property
    def rms(self) -> np.ndarray:
        """Root mean square entry of every block, [blocks, blocks]."""
        return np.sqrt(self.mean / np.outer(self.sizes, self.sizes))

    def contrast(self, one: Sequence[int], other: Sequence[int] | None = None) -> Number:
        """Return the root mean square entry of the diagonal blocks over that of the others.

        Args:
            one: numbers of blocks.
            other: blocks that correspond to them one by one, such as the same neurons in another matrix; None for the
                blocks themselves.
        """
        rows, columns = np.array(one), np.array(one if other is None else other)
        area = np.outer(self.sizes[rows], self.sizes[columns])
        mean, error = self.mean[np.ix_(rows, columns)], self.stderr[np.ix_(rows, columns)]
        same = np.eye(len(rows)) > 0
        inside, outside = (mean[m].sum() / area[m].sum() for m in (same, ~same))
        # In a symmetric map, an estimate and its mirror image are one number, so their errors add up.
        twice = math.sqrt(2) if other is None else 1.0
        relative = [k * np.sqrt(np.square(error[m]).sum()) / mean[m].sum() for m, k in ((same, 1.0), (~same, twice))]
        value = math.sqrt(inside / outside)
        return Number(value, 0.5 * value * math.hypot(*relative), len(rows) - 1)


def head_shares(found: BlockMap) -> dict[str, Number]:
    """Return role -> share of the role's squared norm inside its heads, for roles with two heads or more."""
    groups = {role: [i for i, x in enumerate(found.labels) if x.rsplit(" ", 1)[0] == role] for role in HEAD_ROLES}
    out = {}
    for role, blocks in groups.items():
        if len(blocks) > 1:
            mean, error = found.mean[np.ix_(blocks, blocks)], found.stderr[np.ix_(blocks, blocks)]
            same = np.eye(len(blocks)) > 0
            inside, outside = mean[same].sum(), mean[~same].sum()
            # An estimate and its mirror image are one number, so their errors add up.
            errors = np.sqrt(np.square(error[same]).sum()), 2 * np.sqrt(np.square(np.triu(error, 1)).sum())
            stderr = math.hypot(outside * errors[0], inside * errors[1]) / (inside + outside) ** 2
            out[role] = Number(float(inside / (inside + outside)), float(stderr), len(blocks) - 1)
    return out


def block_map(document: Mapping[str, Any]) -> BlockMap:
    """Return the map of a ``heads``, ``neurons`` or ``tokens`` document."""
    (sample, *_), facts = document["samples"], document["facts"]
    return BlockMap(
        facts["labels"], np.array(sample["mean"]), np.array(sample["stderr"]), np.array(facts["sizes"], dtype=float)
    )


def head_contrasts(found: BlockMap) -> dict[str, Number]:
    """Return role -> contrast between a head and the other heads of the role, for roles with two heads or more."""
    groups = {role: [i for i, x in enumerate(found.labels) if x.rsplit(" ", 1)[0] == role] for role in HEAD_ROLES}
    return {role: found.contrast(blocks) for role, blocks in groups.items() if len(blocks) > 1}


def neuron_contrasts(found: BlockMap) -> dict[str, Number]:
    """Return pair of matrices -> contrast between blocks of the same neurons and blocks of different ones."""
    matrices = list(dict.fromkeys(label.rsplit(" ", 1)[0] for label in found.labels))
    blocks = {m: [i for i, x in enumerate(found.labels) if x.rsplit(" ", 1)[0] == m] for m in matrices}
    pairs = [(a, b) for i, a in enumerate(matrices) for b in matrices[i:]]
    return {f"{a} x {b}": found.contrast(blocks[a], blocks[b]) for a, b in pairs}


@dataclass(frozen=True)
class Spectrum:
    """A spectral density.

    Attributes:
        nodes: Ritz values, [probes, steps].
        weights: [probes, steps].
        order: number of parameters.
    """

    nodes: np.ndarray
    weights: np.ndarray
    order: int

    def mean(self, power: int = 1) -> Number:
        """Return trace(A^power) / order."""
        each = (self.weights * self.nodes**power).sum(1)
        return Number(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))), len(each) - 1)

    def negative(self) -> Number:
        """Return the share of the squared Frobenius norm in negative eigenvalues."""
        squares = self.weights * self.nodes**2
        return ratio(np.where(self.nodes < 0, squares, 0).sum(1), squares.sum(1))

    def density(self, grid: np.ndarray, width: float, sign: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how the squared Frobenius norm is spread over log10 |eigenvalue|, and the standard error, [grid] each.

        Args:
            grid: values of log10 |eigenvalue|.
            width: standard deviation of the Gaussians that smooth it.
            sign: 1 for positive eigenvalues, -1 for negative ones; both together integrate to 1.
        """
        squares = self.weights * self.nodes**2
        share = np.where(self.nodes * sign > 0, squares, 0) / squares.sum(1, keepdims=True)
        place = np.log10(np.maximum(np.abs(self.nodes), 1e-300))
        kernel = np.exp(-0.5 * ((grid - place[..., None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        each = (share[..., None] * kernel).sum(1)
        return each.mean(0), each.std(0, ddof=1) / math.sqrt(len(each))


def spectrum(document: Mapping[str, Any]) -> Spectrum:
    """Return the spectrum of a ``spectrum`` document."""
    (sample, *_), order = document["samples"], document["facts"]["order"]
    return Spectrum(np.array(sample["nodes"]), np.array(sample["weights"]), order)
