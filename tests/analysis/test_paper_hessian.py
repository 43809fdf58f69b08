"""Statistics of the paper's Hessian experiments on results whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.paper_hessian import Results, load, models, quadratics
from analysis.paper_hessian.quadratics import LOSES


def results(cells: dict[str, Any]) -> Results:
    return Results({}, cells, 1.0)


def cost_rows(seed: int, kinds: tuple[str, ...], flip: bool = False) -> list[dict[str, Any]]:
    """Problems in which ``good`` is the cost up to a factor, and ``bad`` is random."""
    generator = np.random.default_rng(seed)
    rows = []
    for kind in kinds:
        for i in range(12):
            cost = (11 - i if flip else i) / 6
            rows.append(
                {
                    "kind": kind,
                    "label": str(i),
                    "d": 8,
                    "numbers": {"good": 3.0 * i, "bad": float(generator.normal()), "size": 3.0 * i, "kappa": 0.0},
                    "steps": {"m": {"adamw": [10.0, 0.1, True], "one scalar": [10.0 * 2**cost, 0.1, i > 0]}},
                }
            )
    return rows


def test_the_winner_tells_and_its_threshold_separates() -> None:
    cells = {f"fit, seed {k}": cost_rows(k, ("a",)) for k in (0, 1)}
    cells |= {f"held out, seed {k}": cost_rows(10 + k, ("b", "c")) for k in (0, 1)}
    found = results(cells)
    table = quadratics.costs(found)
    assert quadratics.names(found) == ["good", "bad", "size", "kappa"] and (~table.inside).sum() == 2 + 4
    verdicts = {name: quadratics.verdict(table, name, resamples=50) for name in quadratics.names(found)}
    best = quadratics.winner(verdicts)
    good = verdicts["good"]
    assert best == "good" and quadratics.tells(good) and not quadratics.tells(verdicts["bad"])
    assert good.fit == pytest.approx(1) and good.held == pytest.approx(1) and good.error == 0 == good.missed
    first = next(i for i in range(12) if i / 6 > LOSES)
    assert 3.0 * (first - 1) < good.threshold < 3.0 * first
    assert verdicts["bad"].held_interval[0] < verdicts["bad"].held < verdicts["bad"].held_interval[1]


def test_a_number_that_is_wrong_on_held_out_problems_does_not_tell() -> None:
    cells = {"fit, seed 0": cost_rows(0, ("a",)), "held out, seed 0": cost_rows(1, ("b",), flip=True)}
    found = quadratics.verdict(quadratics.costs(results(cells)), "good", resamples=20)
    assert found.fit == pytest.approx(1) and found.held == pytest.approx(-1) and not quadratics.tells(found)


def test_unreached_tolerances() -> None:
    rows = cost_rows(0, ("a",))[:4]
    for row, (adamw, one) in zip(rows, ((None, 5.0), (5.0, None), (None, None), (4.0, 8.0)), strict=True):
        row["steps"]["m"] = {"adamw": [adamw, 0.1, True], "one scalar": [one, 0.1, True]}
    cost = quadratics.costs(results({"fit, seed 0": rows})).cost.tolist()
    assert cost[:2] == [-math.inf, math.inf] and math.isnan(cost[2]) and cost[3] == pytest.approx(1)


def test_the_added_number_knows_the_floor_of_momentum() -> None:
    rows = cost_rows(0, ("a",))[:3]
    for row, kappa in zip(rows, (0.0, 0.0, 2.0), strict=True):
        row["numbers"]["kappa"] = kappa
    named = {"beta1 0.9, tolerance 1": rows[0]["steps"]["m"]}
    found = results({"fit, seed 0": [{**row, "steps": named} for row in rows]})
    added = results({"fit, seed 0": [[[1.0, 1.0]], [[300.0, 100.0], [1.0, 1.0]], [[1.0, 300.0]]]})
    table = quadratics.costs(quadratics.with_descent(found, added))
    assert quadratics.floor_of(found, "beta1 0.9, tolerance 1") == 10
    assert table.floored.tolist() == pytest.approx([0, 1, math.log2(10.1 / 40)])
    assert quadratics.names(quadratics.with_descent(found, added))[-1] == "floored"
    with pytest.raises(ValueError, match="has 0 problems of the cell"):
        quadratics.with_descent(found, results({}))


def test_error_rates_and_threshold_by_hand() -> None:
    values, loses = np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])
    assert quadratics.rates_of_error(values, loses, 2.5) == (0.5, 0.5)
    assert quadratics.best_threshold(values, loses) == (1.5, 0.25)
    assert math.isnan(quadratics.rates_of_error(values, np.zeros(4, dtype=bool), 2.5)[0])


def test_resamples_at_once_are_the_resamples_one_by_one() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.integers(5, size=20).astype(float), generator.standard_normal(20)
    x[3], y[4] = math.inf, -math.inf
    index = generator.integers(20, size=(50, 20))
    index[0] = 3  # A constant resample.
    weights = np.stack([np.bincount(row, minlength=20) for row in index]).astype(float)
    expected = [quadratics.spearman(x[row], y[row]) for row in index]
    assert quadratics.spearmans(x, y, weights) == pytest.approx(expected, abs=1e-12) and expected[0] == 0


def test_spearman_with_infinite_values() -> None:
    assert quadratics.spearman(np.array([1.0, 2.0, 3.0]), np.array([-math.inf, 0.0, math.inf])) == pytest.approx(1)
    assert quadratics.spearman(np.array([1.0, 1.0]), np.array([0.0, 1.0])) == 0


def test_ends_of_arms_and_their_differences() -> None:
    def rows(shift: float) -> list[dict[str, Any]]:
        ends = {"gradient descent, one rate": -1.0, "Adam, betas 0, 0.99": -2.0 + shift, "Adam, betas 0, 0.999": -1.5}
        plain = {"problem": "p", "schedule": "constant", "inside": True, "curve": []}
        return [{**plain, "arm": arm, "end": end} for arm, end in ends.items()]

    table = quadratics.ends(results({"seed 0": rows(0.0), "seed 1": rows(0.2)}))
    best = quadratics.better_adam(table, "p", "constant")
    assert best == "Adam, betas 0, 0.99"
    found = quadratics.end_difference(table, "p", "constant", best, "gradient descent, one rate")
    assert found.mean == pytest.approx(-0.9) and found.n == 2


def test_rank_of_r_with_tau() -> None:
    rows = [
        {"amount": a, "tau": [1 - a, 0.9 - a], "r": [a, a + 0.1], "r_first": [-a, -a], "r_mean": [0.0, 0.0]}
        for a in (0.0, 0.5, 0.8)
    ]
    table = quadratics.gains(results({"d 8, condition 10": rows}))
    assert len(table) == 6 and set(table.condition) == {10.0}
    rank, low, high = quadratics.rank_of_gain(table, "r", resamples=20)
    assert low <= rank <= high < -0.5
    assert quadratics.rank_of_gain(table, "r_first", resamples=5)[0] > 0.5


def test_a_form_stands_loses_or_is_open() -> None:
    assert quadratics.standing([0.0, 0.01, -0.01])[1] == "stands"
    assert quadratics.standing([1.0, 1.1, 0.9])[1] == "loses"
    assert quadratics.standing([0.0, 1.0])[1] == "open"
    assert quadratics.standing([0.0, math.inf]) == (None, "loses")
    row = {"kind": "k", "label": "l", "d": 4, "steps": {"m": {"adamw": [8, 1, True], "f": [16, 1, False]}}}
    table = quadratics.matrix_costs(results({"seed 0": [row]}))
    assert table.cost.tolist() == [1.0] and table.inside.tolist() == [False]


def class_cells(power: float) -> dict[str, Any]:
    return {
        f"mse, C {c}, seed {k}": {
            "hidden": {
                "off_diagonal_square": float(c**power * np.exp(0.1 * (-1) ** k)),
                "diagonal_off_absolute": 3.0,
            },
            "output": {"off_diagonal_square": 0.0, "diagonal_off_absolute": None},
        }
        for c in (10, 100, 1000)
        for k in range(6)
    }


def test_exponents_and_the_law() -> None:
    table = models.class_ratios(results(class_cells(-1.0)))
    hidden, output = table[table.layer == "hidden"], table[table.layer == "output"]
    found = models.exponent(hidden, resamples=200)
    assert found is not None and found.value == pytest.approx(-1, abs=0.03) and found.holds
    assert 0 < found.high - found.low < 0.1
    assert models.exponent(output) is None and np.isinf(output.absolute).all()
    steep = models.class_ratios(results(class_cells(-2.0)))
    other = models.exponent(steep[steep.layer == "hidden"], resamples=200)
    assert other is not None and not other.holds


def test_left_out_differences_are_paired() -> None:
    def cell(adamw: float, losses: tuple[float | None, ...]) -> dict[str, Any]:
        rows = [{"loss": x, "factor": 1.0, "inside": True, "added": "w", "searched": [x, None]} for x in losses]
        return {"adamw": adamw, "rows": rows}

    cells = {}
    for seed, base in enumerate((2.0, 3.0, 5.0)):
        cells[f"block, one rate, seed {seed}"] = cell(base, (base + 0.1, None))
        cells[f"block, AdamW's rates, seed {seed}"] = cell(base, (base - 0.1, base))
    table = models.left_out(results(cells))
    found = models.left_out_differences(table, "block", 1)
    assert [found[k].mean for k in found] == pytest.approx([0.2, 0.1, -0.1])
    assert all(x.half < 1e-9 for x in found.values())
    assert np.isinf(table[(table["count"] == 2) & (table.kind == "one rate")].loss).all()
    assert table[table["count"] == 1].diverged.tolist() == [1] * 6


def test_changes_of_lift_are_paired_by_seed() -> None:
    def cell(lift: float) -> list[dict[str, Any]]:
        return [{"checkpoint": 1.0, "role": "KEY", "unit": "OUT_NEURON", "z": 9.0, "lift": lift}]

    cells = {f"base, seed {k}": cell(1.0 + k) for k in range(3)} | {
        f"wide, seed {k}": cell(2.0 + 2 * k) for k in range(3)
    }
    table = models.structure(results(cells))
    found = models.change(table, "wide", "KEY/OUT_NEURON", 1.0)
    assert found is not None and found.mean == pytest.approx(1) and found.excludes_zero
    assert models.change(table, "deep", "KEY/OUT_NEURON", 1.0) is None


def test_distances_leave_the_diagonal_out() -> None:
    def cell(distance: float) -> dict[str, Any]:
        matrix = [[0.0, distance], [distance, 0.0]]
        part = {"distance": matrix, "largest": [100.0, 1.0]}
        return {"initialisation": part, "trained": part, "final_loss": 1.0, "names": ["a", "b"]}

    cells = {f"cnn, seed {k}": cell(0.2 + 0.1 * k) for k in range(2)}
    cells |= {f"transformer, seed {k}": cell(0.5 + 0.1 * k) for k in range(2)}
    table = models.distances(results(cells))
    assert table.distance.tolist()[:2] == pytest.approx([0.2, 0.2]) and set(table.spread) == {2.0}
    found = models.against_cnn(table, "transformer", "trained")
    assert found.mean == pytest.approx(0.3) and found.low > 0


def test_reading_a_part(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--only classes"):
        load(tmp_path, "classes")
    document: dict[str, Any] = {
        "format_version": 1,
        "settings": {},
        "cells": {"a, seed 3": {"result": 1, "seconds": 60}},
    }
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(document))
    found = load(tmp_path, "classes")
    assert found.cells == {"a, seed 3": 1} and found.seconds == 60 and found.seed("a, seed 3") == 3
    for key, value, message in (
        ("format_version", 2, "format_version=2"),
        ("cells", {"a": {"seconds": 1}}, "cell 'a' has no result"),
        ("cells", {}, "holds no cells"),
        ("settings", None, "has no settings"),
    ):
        path.write_text(json.dumps({**document, key: value}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(tmp_path, "classes")
