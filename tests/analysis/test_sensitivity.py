"""Sensitivity: spreads over values at each value's best rate, paired with AdamW's, and the width of the good rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import sensitivity
from analysis.settings import load_settings
from tests.analysis.runs import write_run

USUAL = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
RATES = {0.001: 0.04, 0.01: 0.0, 0.1: 0.5}


def write_study(folder: Path, *, usual: bool = True) -> Path:
    """AdamW loses 0.1 at beta2=0.99; adam_mini loses 0.3, a little more at each seed. eps costs nobody anything."""
    settings = [USUAL] * usual + [{**USUAL, "beta2": 0.99}, {**USUAL, "eps": 1e-4}, {**USUAL, "weight_decay": 0.0}]
    for setting in settings:
        for arm, cost in (("elementwise", 0.1), ("adam_mini", 0.3)):
            for seed in (0, 1, 2):
                for lr, worse in RATES.items():
                    slower = 0.02 if setting["beta2"] == 0.99 and lr == 0.01 else 0.0  # another rate is best there
                    loss = 2.0 + 0.1 * seed + worse + slower
                    if setting["beta2"] == 0.99:
                        loss += cost + (0.01 * seed if arm == "adam_mini" else 0.0)
                    write_run(folder, arm, lr, seed, loss, setting)
    return folder


def test_spreads_are_paired_with_adamw(tmp_path: Path) -> None:
    runs = sensitivity.table(load_settings(write_study(tmp_path)))
    assert sensitivity.usual(runs) == {**USUAL, "eps": 1e-8}
    found = {(one.arm, one.name): one for one in sensitivity.sensitivities(runs)}
    base, mine = found["elementwise", "beta2"], found["adam_mini", "beta2"]
    assert base.spread is not None and base.spread.mean == pytest.approx(0.12) and base.difference is None
    assert mine.spread is not None and mine.spread.mean == pytest.approx(0.33)
    assert mine.difference is not None and mine.difference.mean == pytest.approx(0.21)
    assert mine.difference.excludes_zero and mine.worst == 0.99 and mine.values == (0.95, 0.99)
    rate = found["adam_mini", "lr"]
    assert rate.spread is not None and rate.spread.mean == pytest.approx(0.5) and rate.worst == 0.1
    assert rate.difference is not None and not rate.difference.excludes_zero
    decay = found["adam_mini", "weight_decay"]
    assert decay.spread is not None and decay.spread.mean == pytest.approx(0.0) and decay.values == (0.0, 0.1)


def test_the_width_of_good_rates_is_interpolated(tmp_path: Path) -> None:
    runs = sensitivity.table(load_settings(write_study(tmp_path)))
    decades, cut = sensitivity.good_decades(runs, "adam_mini")
    assert decades == pytest.approx(1.1, abs=1e-3) and cut, "a whole decade below, a tenth of one above"


def test_a_diverged_value_has_no_spread(tmp_path: Path) -> None:
    write_study(tmp_path)
    for seed in (0, 1, 2):
        write_run(tmp_path, "adam_mini", 0.01, seed, 2.0, {**USUAL, "beta1": 0.99}, state="diverged")
        write_run(tmp_path, "elementwise", 0.01, seed, 2.0, {**USUAL, "beta1": 0.99})
    found = {(one.arm, one.name): one for one in sensitivity.sensitivities(sensitivity.table(load_settings(tmp_path)))}
    assert found["adam_mini", "beta1"].spread is None and found["adam_mini", "beta1"].difference is None
    assert found["elementwise", "beta1"].spread is not None


def test_without_the_usual_values_nothing_can_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 settings may have the usual values"):
        sensitivity.table(load_settings(write_study(tmp_path, usual=False)))


def test_seeds_that_some_value_lacks_do_not_count(tmp_path: Path) -> None:
    write_study(tmp_path)
    whole = {(one.arm, one.name): one for one in sensitivity.sensitivities(sensitivity.table(load_settings(tmp_path)))}
    for arm in ("elementwise", "adam_mini"):
        write_run(tmp_path, arm, 0.01, 3, 1.0, USUAL)  # a seed that has begun
    part = {(one.arm, one.name): one for one in sensitivity.sensitivities(sensitivity.table(load_settings(tmp_path)))}
    assert part == whole
    write_run(tmp_path, "adam_mini", 0.02, 0, 1.0, USUAL)
    with pytest.raises(ValueError, match="no seed is complete"):
        sensitivity.table(load_settings(tmp_path))
