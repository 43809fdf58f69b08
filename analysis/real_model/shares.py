"""How much of the squared norm lies inside blocks, for single matrices, layers and the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .maps import BlockMap
from .numbers import Number, by_chance, ratio, relative_error, stratified
from .study import CONTROL, PARTITIONS, WHOLE

_BLOCKS = (*PARTITIONS, CONTROL)


def energy(document: Mapping[str, Any], roles: Sequence[str] | None = None, of: str = WHOLE) -> pd.DataFrame:
    """Return the share inside the blocks of every partition: partition, share, control and relative error.

    Args:
        document: an ``energy`` document.
        roles: only the rows of the parameters of these roles; None for all.
        of: what the share is of: the whole operator, or "tensor", the blocks of the tensors by themselves.
    """
    parameters, samples = document["facts"]["parameters"], document["samples"]
    chosen = [i for i, p in enumerate(parameters) if roles is None or p["role"] in roles]
    sums = {key: np.array([np.array(s[key])[chosen].sum() for s in samples]) for key in samples[0]}
    sizes = np.array([float(np.prod(p["shape"])) for p in parameters])[chosen]
    diagonal, rows = ratio(sums["element"], sums[of]), []
    for name in (key for key in PARTITIONS if key in sums and key != of):
        share = ratio(sums[name], sums[of])
        squares = np.array(document["facts"]["squares"][name], dtype=float)[chosen]
        rows.append([name, share, _control(diagonal, squares, sizes, of), relative_error(share)])
    return pd.DataFrame(rows, columns=["partition", "share", "control", "error"])


def matrices(document: Mapping[str, Any]) -> pd.DataFrame:
    """Return the share of every matrix's own squared norm inside blocks: name, role, partition, share, control, n.

    Args:
        document: a ``matrices`` document. Matrices with fewer than two samples are left out.
    """
    rows, parameters = [], document["facts"]["parameters"]
    for i, parameter in enumerate(parameters):
        samples = [s for s in document["samples"] if s["parameter"] == parameter["name"]]
        if len(samples) > 1:
            own, n = np.array([s[WHOLE][i] for s in samples]), float(np.prod(parameter["shape"]))
            found = {name: ratio(np.array([s[name] for s in samples]), own) for name in samples[0] if name in _BLOCKS}
            for name, share in found.items():
                squares = document["facts"]["squares"]["row" if name == CONTROL else name][i]
                control = by_chance(found["element"], float(squares), n)
                rows.append([parameter["name"], parameter["role"], name, share, control, len(samples)])
    return pd.DataFrame(rows, columns=["name", "role", "partition", "share", "control", "n"])


def between_matrices(document: Mapping[str, Any]) -> Number | None:
    """Return the share of a layer's squared norm inside the blocks of its matrices; None before a complete round."""
    names = [p["name"] for p in document["facts"]["parameters"]]
    found = [[s[WHOLE] for s in document["samples"] if s["parameter"] == name] for name in names]
    probes = min(len(samples) for samples in found)
    if not probes:
        return None
    columns = np.array([samples[:probes] for samples in found])  # [source, probe, target]
    return stratified(np.array([columns[i, :, i] for i in range(len(names))]), columns.sum(2))


def _control(diagonal: Number, squares: np.ndarray, sizes: np.ndarray, of: str) -> Number:
    """Return the share by chance in the whole operator, or in tensors of equal kind, weighted by their size."""
    if of == WHOLE:
        return by_chance(diagonal, float(squares.sum()), float(sizes.sum()))
    pairs = float(np.average((squares - sizes) / np.maximum(sizes * sizes - sizes, 1), weights=sizes))
    return Number(diagonal.value + pairs * (1 - diagonal.value), diagonal.stderr * (1 - pairs), diagonal.freedom)


@dataclass(frozen=True)
class LayerMap:
    """Squared norms of the blocks between layers.

    Attributes:
        layers: names of the layers.
        mean: [layers, layers].
        stderr: [layers, layers]; NaN with a single probe.
        sizes: parameters of each layer.
        share: share inside the diagonal blocks.
        probes: complete rounds of probes.
    """

    layers: list[str]
    mean: np.ndarray
    stderr: np.ndarray
    sizes: np.ndarray
    share: Number
    probes: int

    def blocks(self) -> BlockMap:
        """Return the map without layers that are much smaller than the others, such as the last norm."""
        large = np.flatnonzero(self.sizes > 0.01 * np.median(self.sizes))
        inner = np.ix_(large, large)
        return BlockMap([self.layers[i] for i in large], self.mean[inner], self.stderr[inner], self.sizes[large])

    def chance(self, energies: Mapping[str, Any] | None) -> float:
        """Return the share by chance.

        Args:
            energies: the ``energy`` document of the same matrix, for the share of the diagonal; None if there is none,
                and the diagonal is then left out.
        """
        diagonal = Number(0.0, 0.0, 1)
        if energies is not None:
            found = energy(energies).set_index("partition")
            diagonal = found.share["element"]
        return by_chance(diagonal, float(np.square(self.sizes).sum()), float(self.sizes.sum())).value


def _rounds(document: Mapping[str, Any]) -> np.ndarray:
    """Return the squared norms of a ``columns`` document, [source layer, probe, parameter], complete rounds only."""
    found: dict[str, list[Any]] = {layer: [] for layer in document["facts"]["layers"]}
    for sample in document["samples"]:
        found[sample["layer"]].append(sample["squares"])
    probes = min(len(columns) for columns in found.values())
    return np.array([columns[:probes] for columns in found.values()], dtype=float).reshape(
        len(found), probes, len(document["facts"]["parameters"])
    )


def layer_map(document: Mapping[str, Any]) -> LayerMap | None:
    """Return the map of layers of a ``columns`` document; None before the first round is complete."""
    layers, parameters, rounds = document["facts"]["layers"], document["facts"]["parameters"], _rounds(document)
    probes = rounds.shape[1]
    if not probes:
        return None
    group = np.array([layers.index(p["layer"]) for p in parameters])
    sizes = np.bincount(group, weights=[float(np.prod(p["shape"])) for p in parameters])
    columns = np.stack([rounds[:, :, group == i].sum(2) for i in range(len(layers))], axis=2)  # [source, probe, target]
    own = np.array([columns[i, :, i] for i in range(len(layers))])
    mean = columns.mean(1)
    stderr = columns.std(1, ddof=1) / math.sqrt(probes) if probes > 1 else np.full_like(mean, np.nan)
    off = 0.5 * np.hypot(stderr, stderr.T)
    share = stratified(own, columns.sum(2))
    return LayerMap(layers, (mean + mean.T) / 2, np.where(np.eye(len(layers)) > 0, stderr, off), sizes, share, probes)


def by_role(document: Mapping[str, Any]) -> dict[str, tuple[int, Number]]:
    """Return role -> (number of parameters, share of the squared norm in their rows), of a ``columns`` document."""
    parameters, rounds = document["facts"]["parameters"], _rounds(document)
    roles, out = np.array([p["role"] for p in parameters]), {}
    for role in dict.fromkeys(roles.tolist()):
        size = sum(int(np.prod(p["shape"])) for p in parameters if p["role"] == role)
        out[role] = (size, stratified(rounds[:, :, roles == role].sum(2), rounds.sum(2)))
    return out


def of_model(energies: Mapping[str, Any] | None, columns: Mapping[str, Any] | None) -> list[tuple[str, Number, float]]:
    """Return (partition, share, share by chance) of the whole model, with its layers; empty without results.

    Args:
        energies: an ``energy`` document, or None.
        columns: a ``columns`` document, or None.
    """
    rows = [] if energies is None else [(r.partition, r.share, r.control.value) for r in energy(energies).itertuples()]
    found = None if columns is None else layer_map(columns)
    if found is not None:
        rows.append(("layer", found.share, found.chance(energies)))
    return rows
