"""Trajectories: distances are paired by seed with adam_mini's, and a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis import trajectories


def write_ways(path: Path) -> Path:
    def seed(shift: float) -> dict[str, object]:
        ways = {"adam_mini": 1.0, "lion": 2.0, "perturbed": 0.1, "other batches": 1.5 + shift}
        arms = {
            arm: {"distance": [0.1, far], "cosine": [1.0, 1 / far if far > 1 else 1.0]} for arm, far in ways.items()
        }
        return {"steps": [25, 50], "moved": [1.0, 2.0], "arms": arms}

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seeds": {str(i): seed(0.01 * i) for i in range(3)}}))
    return path


def test_distances_are_sorted_and_paired(tmp_path: Path) -> None:
    found = trajectories.load(write_ways(tmp_path / "a.json"))
    assert [one.arm for one in found] == ["perturbed", "adam_mini", "other batches", "lion"]
    perturbed, base, other, lion = found
    assert base.difference is None and lion.difference is not None and lion.difference.mean == pytest.approx(1.0)
    assert other.last.mean == pytest.approx(1.51) and other.last.half > 0 and other.last.n == 3
    assert np.array_equal(lion.steps, [25, 50]) and lion.distance == pytest.approx([0.1, 2.0])
    assert lion.cosine.mean == 0.5 and perturbed.difference is not None and perturbed.difference.mean < 0


@pytest.mark.parametrize("content", ['{"seeds": {}}', "{}", '{"seeds": {"0": {"steps": [1], "arms": {}}}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="has no distances of 'adam_mini'"):
        trajectories.load(path)
    with pytest.raises(FileNotFoundError, match=r"run `python -m experiments.studies.trajectories` again"):
        trajectories.load(tmp_path / "b.json")
