"""Statistics of the Hessian of a real model: shares inside blocks, maps, spectra, gaps. See docs/real_model.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from analysis.documents import damaged, read_object

PARTITIONS = ("element", "column", "row", "head", "tensor")
CONTROL = "random"
HEAD_ROLES = ("QUERY", "KEY", "VALUE", "ATTENTION_OUT")
WHOLE = "whole"
_BLOCKS = (*PARTITIONS, CONTROL)
_MEND = "run `make real-model` again"


@dataclass(frozen=True)
class Number:
    """An estimate.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        freedom: degrees of freedom of the standard error.
    """

    value: float
    stderr: float
    freedom: float

    @property
    def half(self) -> float:
        """Half the width of Student's 95 % interval."""
        return float(scipy.stats.t.ppf(0.975, self.freedom)) * self.stderr if self.freedom > 0 else math.inf

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half


@dataclass(frozen=True)
class Study:
    """The results: name of a task -> its document, for tasks with a sample.

    Attributes:
        documents: the documents.
    """

    documents: Mapping[str, dict[str, Any]]

    def of(self, kind: str, **task: Any) -> list[dict[str, Any]]:
        """Return the documents of a kind whose task has the given entries."""
        wanted = {"kind": kind, **task}
        return [d for d in self.documents.values() if wanted.items() <= d["task"].items()]

    def one(self, kind: str, **task: Any) -> dict[str, Any] | None:
        """Return the only document that ``of`` finds, None if there is none."""
        found = self.of(kind, **task)
        return found[0] if found else None

    @property
    def hours(self) -> float:
        """Time of all samples, in hours of one thread."""
        return sum(sum(d["seconds"]) for d in self.documents.values()) / 3600


def load(folder: Path) -> Study:
    """Read the results.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a file is damaged.
    """
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = read_object(path, _MEND)
        for key, kind in (("task", dict), ("facts", dict), ("samples", list), ("seconds", list)):
            if not isinstance(document.get(key), kind):
                raise damaged(path, f"it has no {key}", _MEND)
        if document["samples"]:
            documents[path.stem] = document
    if not documents:
        raise FileNotFoundError(f"no results in {folder}; run `make real-model` first")
    return Study(documents)


# ------------------------------------------------------------------------------------------------------------ shares


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Number:
    """Return the ratio of two means over samples, with the jackknife's standard error.

    Args:
        numerators: [samples].
        denominators: [samples].
    """
    n = len(numerators)
    value = float(numerators.sum() / denominators.sum())
    if n < 2:
        return Number(value, math.inf, 0)
    without = (numerators.sum() - numerators) / (denominators.sum() - denominators)
    return Number(value, float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())), n - 1)


def by_chance(diagonal: Number, squares: float, n: float) -> Number:
    """Return the mean share of random blocks of the same sizes.

    Args:
        diagonal: share of the diagonal.
        squares: sum of the squared block sizes.
        n: number of parameters.
    """
    pairs = (squares - n) / (n * n - n)
    return Number(diagonal.value + pairs * (1 - diagonal.value), diagonal.stderr * (1 - pairs), diagonal.freedom)


def stratified(own: np.ndarray, whole: np.ndarray) -> Number:
    """Return the ratio of two sums over strata of means over probes, each stratum with its own variance.

    The degrees of freedom are Satterthwaite's.

    Args:
        own: [strata, probes].
        whole: [strata, probes].
    """
    probes, value = own.shape[1], float(own.sum() / whole.sum())
    if probes < 2:
        return Number(value, math.inf, 0)
    variances = (own - value * whole).var(1, ddof=1) / probes / (whole.mean(1).sum() ** 2)
    freedom = (probes - 1) * variances.sum() ** 2 / max(float(np.square(variances).sum()), 1e-300)
    return Number(value, float(np.sqrt(variances.sum())), float(freedom))


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


def relative_error(share: Number) -> Number:
    """Return sqrt(1 - share), the relative Frobenius error of keeping the blocks only, by error propagation."""
    value = math.sqrt(max(0.0, 1 - share.value))
    return Number(value, share.stderr / (2 * max(value, 1e-12)), share.freedom)


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


# -------------------------------------------------------------------------------------------------------------- maps


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


# ----------------------------------------------------------------------------------------------------------- spectra


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


# ----------------------------------------------------------------------------------------------------- second moments


def evidence(study: Study) -> pd.DataFrame:
    """Return the evidence of all runs: seed, and the columns of the results. Empty if there is no run."""
    frames = []
    for name, document in study.documents.items():
        if document["task"]["kind"] == "moments":
            sample = document["samples"][0]
            frames.append(pd.DataFrame(sample["rows"], columns=sample["columns"]).assign(seed=name.split("-")[1]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Return role, unit, gap (a ``Number`` over layers), scalars per parameter, least z, and the gap of every seed.

    The gap is the mean over tensors, weighted by size, of the mean over seeds.
    """
    rows = []
    for (role, unit), part in table.groupby(["role", "unit"], sort=False):
        tensors = part.groupby("tensor", sort=False).agg(gap=("jensen", "mean"), n=("n_params", "first"))
        layers = part.groupby("layer").apply(
            lambda x: np.average(x["jensen"], weights=x["n_params"]), include_groups=False
        )
        error = float(layers.std(ddof=1) / math.sqrt(len(layers))) if len(layers) > 1 else math.nan
        value = float(np.average(tensors["gap"], weights=tensors["n"]))
        seeds = {s: float(np.average(x["jensen"], weights=x["n_params"])) for s, x in part.groupby("seed")}
        scalars = float(part["n_blocks"].sum() / part["n_params"].sum())
        rows.append([role, unit, Number(value, error, len(layers) - 1), scalars, float(part["z"].min()), seeds])
    return pd.DataFrame(rows, columns=["role", "unit", "gap", "scalars", "z", "seeds"])


def difference(table: pd.DataFrame, role: str, one: str, other: str) -> tuple[Number, bool]:
    """Return the gap of one unit minus another's, over layers, and whether they differ by rule R4.

    Args:
        table: the evidence.
        role: the role.
        one: a unit.
        other: another one.
    """
    part = table[table.role == role]
    wide = part.pivot_table(index=["seed", "layer", "tensor"], columns="unit", values="jensen")
    change = (wide[one] - wide[other]).rename("change").reset_index()
    layers = change.groupby("layer").change.mean()
    error = float(layers.std(ddof=1) / math.sqrt(len(layers))) if len(layers) > 1 else math.nan
    number = Number(float(layers.mean()), error, len(layers) - 1)
    signs = {bool(x > 0) for x in change.groupby("seed").change.mean()}
    beyond = abs(number.value) > 2 * error if len(layers) > 1 else number.value != 0
    return number, len(signs) == 1 and beyond


def choices(study: Study) -> dict[str, dict[str, str]]:
    """Return seed -> role -> the unit that ``derive`` chose."""
    return {
        name.split("-")[1]: {role: choice["unit"] for role, choice in d["samples"][0]["choices"].items()}
        for name, d in study.documents.items()
        if d["task"]["kind"] == "moments"
    }
