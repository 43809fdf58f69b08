"""Statistics of the real model's Hessian on numbers whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import real_model
from analysis.real_model import BlockMap, Number, Spectrum, by_chance, ratio, relative_error, stratified


def test_a_ratio_has_the_jackknifes_error() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 3.0, 7.0, 8.0])
    found = ratio(x, y)
    without = [(12 - a) / (20 - b) for a, b in zip(x, y, strict=True)]
    assert found.value == 0.6 and found.freedom == 3
    assert found.stderr == pytest.approx(math.sqrt(0.75 * sum((w - np.mean(without)) ** 2 for w in without)))
    assert found.high - found.value == pytest.approx(3.1824 * found.stderr, rel=1e-4)
    assert ratio(x[:1], y[:1]).half == math.inf


def test_random_blocks_hold_the_diagonal_and_their_share_of_pairs() -> None:
    """Against all partitions of six elements into three pairs."""
    matrix = np.arange(36.0).reshape(6, 6)
    squares, shares = (matrix + matrix.T) ** 2, []
    generator = np.random.default_rng(0)
    for _ in range(4000):
        ids = generator.permutation(6) // 2
        shares.append(squares[ids[:, None] == ids].sum() / squares.sum())
    diagonal = Number(float(np.trace(squares) / squares.sum()), 0.01, 3)
    found = by_chance(diagonal, squares=12.0, n=6)
    assert found.value == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / math.sqrt(4000))
    assert found.stderr == pytest.approx(0.01 * (1 - 6 / 30))


def test_strata_have_variances_of_their_own() -> None:
    """Strata that differ but have equal probes leave no error; noise in one stratum has one degree of freedom."""
    exact = stratified(np.array([[1.0, 1.0], [50.0, 50.0]]), np.array([[2.0, 2.0], [100.0, 100.0]]))
    assert (exact.value, exact.stderr) == (0.5, 0.0)
    noisy = stratified(np.array([[1.0, 3.0], [50.0, 50.0]]), np.array([[4.0, 4.0], [100.0, 100.0]]))
    assert noisy.freedom == pytest.approx(1) and noisy.stderr == pytest.approx(1.0 / 104)
    assert relative_error(Number(0.36, 0.01, 5)).value == pytest.approx(0.8)
    assert relative_error(Number(0.36, 0.01, 5)).stderr == pytest.approx(0.01 / 1.6)


def columns() -> dict[str, object]:
    parameters = [
        {"name": f"p{i}", "layer": layer, "shape": [n]}
        for i, (layer, n) in enumerate(zip("aab", (1, 3, 5), strict=True))
    ]
    samples = [{"layer": "a", "squares": [4, 2, 4]}, {"layer": "b", "squares": [1, 2, 10]}]
    samples += [{"layer": "a", "squares": [4, 4, 2]}]
    return {"facts": {"layers": ["a", "b"], "parameters": parameters}, "samples": samples, "seconds": []}


def test_a_map_of_layers_takes_complete_rounds_only() -> None:
    found = real_model.layer_map(columns())
    assert found is not None and found.probes == 1
    assert found.mean.tolist() == [[6, 3.5], [3.5, 10]] and found.sizes.tolist() == [4, 5]
    assert found.share.value == 16 / 23 and found.share.half == math.inf
    pairs = (4 * 3 + 5 * 4) / (9 * 8)
    assert found.chance(None) == pytest.approx(pairs)
    sample = {"element": [1, 1, 2], "whole": [4, 8, 8]}
    facts = {**columns()["facts"], "squares": {"element": [1, 3, 5]}}  # type: ignore[dict-item]
    assert found.chance({"facts": facts, "samples": [sample, sample]}) == pytest.approx(0.2 + 0.8 * pairs)
    document = columns()
    document["samples"].append({"layer": "b", "squares": [1, 2, 12]})  # type: ignore[union-attr]
    both = real_model.layer_map(document)
    assert both is not None and both.probes == 2 and both.mean.tolist() == [[7, 3], [3, 11]]
    assert math.isfinite(both.share.half)
    document["samples"] = document["samples"][:1]  # type: ignore[index]
    assert real_model.layer_map(document) is None


def test_contrast_of_heads() -> None:
    """Entries of 3 inside and of 1 between: the contrast is 3, whatever the sizes."""
    sizes = np.array([2.0, 4.0, 3.0])
    mean = np.outer(sizes, sizes) * (1 + 8 * np.eye(3))
    found = BlockMap(["QUERY 0", "QUERY 1", "QUERY 2"], mean, 0.1 * mean, sizes)
    assert real_model.head_contrasts(found)["QUERY"].value == pytest.approx(3)
    inside = 0.1 * np.linalg.norm(np.diag(mean)) / np.trace(mean)
    off = mean[~np.eye(3, dtype=bool)]
    outside = 0.1 * math.sqrt(2) * np.linalg.norm(off) / off.sum()
    assert real_model.head_contrasts(found)["QUERY"].stderr == pytest.approx(1.5 * math.hypot(inside, outside))
    share = real_model.head_shares(found)["QUERY"]
    whole = mean.sum()
    assert share.value == pytest.approx(np.trace(mean) / whole)
    errors = 0.1 * np.linalg.norm(np.diag(mean)), 0.1 * math.sqrt(2) * np.linalg.norm(off)
    assert share.stderr == pytest.approx(math.hypot(off.sum() * errors[0], np.trace(mean) * errors[1]) / whole**2)
    assert set(real_model.neuron_contrasts(found)) == {"QUERY x QUERY"}


def test_spectra() -> None:
    nodes, weights = np.array([[1.0, -3.0], [1.0, -3.0]]), np.array([[0.9, 0.1], [0.9, 0.1]])
    found = Spectrum(nodes, weights, 100)
    assert found.mean().value == pytest.approx(0.6) and found.mean(2).value == pytest.approx(1.8)
    assert found.negative().value == pytest.approx(0.5)
    grid = np.linspace(-3, 3, 2001)
    area = [float(np.trapezoid(found.density(grid, 0.1, sign)[0], grid)) for sign in (1, -1)]
    assert area == pytest.approx([0.5, 0.5], abs=1e-6)


def rows(change: float) -> pd.DataFrame:
    """One role with two layers of two tensors each and two seeds: the gap of TENSOR exceeds that of HEAD by change."""
    out = []
    for seed in "01":
        for layer in range(2):
            for tensor in range(2):
                base = 0.1 + 0.01 * layer + 0.001 * tensor + 0.002 * int(seed)
                for unit, gap in (("HEAD", base), ("TENSOR", base + change * (1 + 0.1 * layer))):
                    out.append(
                        [
                            f"{layer}.{tensor}",
                            f"layer {layer}",
                            "QUERY",
                            unit,
                            100 * (1 + tensor),
                            10,
                            gap,
                            1.0,
                            50.0,
                            seed,
                        ]
                    )
    names = ["tensor", "layer", "role", "unit", "n_params", "n_blocks", "jensen", "jensen_null", "z", "seed"]
    return pd.DataFrame(out, columns=names)


def test_gaps_weigh_tensors_by_size_and_differ_beyond_their_error() -> None:
    table = real_model.gaps(rows(0.05)).set_index("unit")
    weighted = [0.1 + 0.01 * layer + 0.002 / 3 + 0.001 for layer in range(2)]
    assert table.gap["HEAD"].value == pytest.approx(np.mean(weighted))
    assert table.gap["HEAD"].stderr == pytest.approx(np.std(weighted, ddof=1) / math.sqrt(2))
    assert table.seeds["HEAD"]["1"] - table.seeds["HEAD"]["0"] == pytest.approx(0.002)
    number, differ = real_model.difference(rows(0.05), "QUERY", "TENSOR", "HEAD")
    assert number.value == pytest.approx(0.0525) and differ
    mixed = rows(0.05)
    flipped = mixed.jensen.where((mixed.seed == "0") | (mixed.unit == "HEAD"), mixed.jensen - 0.2)
    assert not real_model.difference(mixed.assign(jensen=flipped), "QUERY", "TENSOR", "HEAD")[1], "the seeds disagree"


def test_damaged_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make real-model"):
        real_model.load(tmp_path)
    path = tmp_path / "energy.json"
    path.write_text(json.dumps({"task": {}, "facts": {}, "samples": 3, "seconds": []}))
    with pytest.raises(ValueError, match=r"energy\.json is damaged \(it has no samples\)"):
        real_model.load(tmp_path)
