"""Compact maps of |H|: what the levels keep, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis import hessian_maps
from analysis.hessian_maps import CELLS, DECADES, compact


def symmetric(n: int) -> np.ndarray:
    half = np.abs(np.random.default_rng(0).standard_normal((n, n)))
    return half + half.T


def test_values_come_back_to_half_a_level() -> None:
    matrix = symmetric(16)
    found = compact(matrix)
    assert found.cells == 16 and found.levels.shape == (16 * 17 // 2,)
    kept = (matrix > 10**found.low) & (matrix < 10**found.high)
    assert kept.mean() > 0.9
    error = np.abs(np.log10(found.values[kept]) - np.log10(matrix[kept]))
    assert error.max() <= 0.5001 * DECADES / 255


@pytest.mark.parametrize("n", [256, 300])
def test_larger_matrices_are_averaged(n: int) -> None:
    matrix = np.ones((n, n))
    matrix[: n // 2, : n // 2] = 100.0
    found = compact(matrix)
    assert found.cells == CELLS and found.n == n
    assert np.allclose(found.values[:60, :60], 100, rtol=0.02) and np.allclose(found.values[70:], 1, rtol=0.02)


def entry(found: hessian_maps.Map) -> dict[str, object]:
    packed = {"n": found.n, "cells": found.cells, "low": found.low, "high": found.high, "levels": "eJwDAAAAAAE="}
    return {"tensor": "wq", "model": "gpt", "orders": {"rows": packed}}


def test_damaged_levels_are_named() -> None:
    with pytest.raises(ValueError, match=r"map of wq in gpt has 0 levels; write it again"):
        hessian_maps.read(entry(compact(symmetric(8))), "rows")
    broken = entry(compact(symmetric(8)))
    broken["orders"]["rows"]["levels"] = "no base64"  # type: ignore[index]
    with pytest.raises(ValueError, match="map of wq in gpt is damaged"):
        hessian_maps.read(broken, "rows")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "run `make hessian`, then"),
        ("{", "is damaged"),
        (json.dumps({"format_version": 9}), "format_version=9"),
        (json.dumps({"format_version": 1, "settings": {"a": 1}, "subjects": {"a": 1}, "maps": []}), "it has no maps"),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "maps.json").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        hessian_maps.load(tmp_path)


def test_the_command_names_a_study_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hessian_maps.main([str(tmp_path)])
    assert ended.value.code == 2 and "run `make hessian` to its end first" in capsys.readouterr().err
