"""Distances from AdamW's weights: zero for AdamW itself, controls between, and the file grows seed by seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments.configs import smoke
from experiments.storage import read_json, write_json
from experiments.studies import trajectories
from experiments.studies.trajectories import BASE, OTHER_BATCHES, PERTURBED, Settings, compared, distances, run

ARMS = (BASE, PERTURBED, "adam_mini", OTHER_BATCHES)
SMALL = Settings(dataclasses.replace(smoke(), steps=6), every=4, arms=ARMS, seeds=(0,))


def test_adamw_is_at_no_distance_from_itself_and_controls_are_ordered() -> None:
    found = distances(SMALL, 0)
    assert found["steps"] == [4, 6] and found["moved"][1] > found["moved"][0] > 0
    last = {arm: found["arms"][arm]["distance"][-1] for arm in ARMS}
    assert last[BASE] == 0 < last[PERTURBED] < last["adam_mini"] < last[OTHER_BATCHES]
    assert found["arms"][BASE]["cosine"][-1] == pytest.approx(1) and found["arms"]["adam_mini"]["cosine"][-1] < 0.999


def test_distances_are_in_ways_of_adamw() -> None:
    assert compared(torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])) == (5 / 4, 0.0)


def test_the_file_grows_seed_by_seed_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "distances.json"
    first = run(SMALL, out)
    calls = []
    monkeypatch.setattr(trajectories, "distances", lambda settings, seed: calls.append(seed) or {"steps": []})
    both = run(dataclasses.replace(SMALL, seeds=(0, 1)), out)
    assert calls == [1] and both["seeds"]["0"] == first["seeds"]["0"] and read_json(out) == both
    with pytest.raises(ValueError, match="was written with other settings"):
        run(dataclasses.replace(SMALL, every=2), out)
    write_json(out, {})
    with pytest.raises(ValueError, match="was written with other settings"):
        run(SMALL, out)
