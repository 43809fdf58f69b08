"""The predicted cost of a rule set: an average by hand, the limiting cases, and evidence that is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.grids import ARMS
from experiments.models import LlamaConfig, MLPConfig, build
from experiments.studies.predicted_cost import is_factored, main, predicted_cost
from optimizer import Rules


def choices(**gaps: float) -> dict[str, Any]:
    measured = {"candidates": [{"unit": u, "jensen": g, "jensen_null": 10 * g} for u, g in gaps.items()]}
    return {"MLP_IN": measured, "MLP_OUT": measured}


def test_by_hand() -> None:
    model = build(MLPConfig(vocab=3, context=2, hidden=4), 0)  # two dense layers
    measured = choices(TENSOR=0.5, OUT_NEURON=0.2, IN_NEURON=0.3)
    assert predicted_cost(model, "pytorch_default", measured) == pytest.approx(0.5)
    assert predicted_cost(model, "adam_mini", measured) == pytest.approx(0.2)
    assert predicted_cost(model, "slim_adam", measured) == pytest.approx(0.3)
    assert predicted_cost(model, "permuted", measured) == pytest.approx(2.0)
    assert predicted_cost(model, "elementwise", measured) == 0
    with pytest.raises(KeyError):
        predicted_cost(model, "slim_adam", choices(TENSOR=0.5))


def test_shipped_evidence_covers_every_arm() -> None:
    model = build(LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden=8), 0)
    evidence = Rules("derived_blocks").evidence["choices"]
    costs = {arm: predicted_cost(model, arm, evidence) for arm in ARMS if not is_factored(arm)}
    assert (
        costs["elementwise"]
        == 0
        < costs["derived_blocks"]
        == min(c for arm, c in costs.items() if arm != "elementwise")
    )


def test_an_arm_without_measurements_is_written_as_null(tmp_path: Path) -> None:
    main(tmp_path / "costs.json")
    costs = json.loads((tmp_path / "costs.json").read_text())["cost"]
    assert set(costs) == set(ARMS)
    assert [arm for arm, cost in costs.items() if cost is None] == ["derived", "factored"]
