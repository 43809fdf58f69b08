"""Settings and corrected comparisons: what pairs, what is counted, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.ablation import best_rates
from analysis.settings import compare, differing, load_settings
from analysis.stats import bootstrap_interval, holm, sign_flip_p, t_interval
from tests.analysis.runs import write_grid, write_run


def test_runs_are_grouped_by_what_they_share(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "a")
    for seed in (0, 1, 2):
        write_run(folder, "elementwise", 0.01, seed, 3.0, {"clip": 0.0, "model": {"dim": 8}})
    settings = load_settings(folder)
    assert [len(setting.runs) for setting in sorted(settings, key=lambda s: len(s.runs))] == [3, 12]
    assert {"clip": 0.0, "model.dim": 8} in differing(settings)
    assert all("lr" not in setting.shared and "seed" not in setting.shared for setting in settings)


def test_equal_runs_of_two_studies_count_once_and_their_distance_is_kept(tmp_path: Path) -> None:
    first, second = write_grid(tmp_path / "a"), tmp_path / "b"
    write_run(second, "adam_mini", 0.01, 0, 9.0, {"experiment": "b"})
    (setting,) = load_settings(first, second)
    row = setting.runs[(setting.runs.arm == "adam_mini") & (setting.runs.lr == 0.01) & (setting.runs.seed == 0)]
    assert row.final_val_loss.tolist() == [2.1] and setting.disagreement == pytest.approx(6.9)
    assert load_settings(first)[0].disagreement == 0


def test_an_arm_is_compared_at_its_best_rate_within_a_seed(tmp_path: Path) -> None:
    (setting,) = load_settings(write_grid(tmp_path))
    base, mine = compare(setting.runs)
    assert (base.arm, base.difference) == ("elementwise", None)
    assert mine.difference is not None and mine.difference.mean == pytest.approx(0.101) and mine.n == 3
    assert mine.at_edge and mine.lr == 0.01 and mine.p == 0.25 == mine.p_corrected
    with pytest.raises(ValueError, match=r"against='adamw' has no runs here; the arms are"):
        compare(setting.runs, "adamw")


def test_the_best_rate_is_chosen_from_seeds_that_all_rates_have(tmp_path: Path) -> None:
    """Seed 0 is easy for every rate. An interrupted study has it at the worse rate alone."""
    losses = {0: 1.0, 1: 3.0, 2: 3.0}
    for arm, good in (("elementwise", 0.01), ("lion", 0.1)):
        for lr in (0.01, 0.1):
            for seed, loss in losses.items():
                if lr == good or seed == 0:
                    write_run(tmp_path, arm, lr, seed, loss + (0.0 if lr == good else 0.5))
    (setting,) = load_settings(tmp_path)
    assert best_rates(setting.runs) == {"elementwise": 0.01, "lion": 0.1}
    assert {one.arm: (one.lr, one.n) for one in compare(setting.runs)} == {"elementwise": (0.01, 3), "lion": (0.1, 3)}
    # Rates without a common seed: the one with fewer seeds is left out.
    apart = setting.runs[(setting.runs.arm == "lion") & ((setting.runs.lr == 0.01) | (setting.runs.seed > 0))]
    assert best_rates(apart) == {"lion": 0.1}


def test_runs_of_two_versions_of_rules_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "derived", 0.01, 0, 2.0, {"rules_hash": "old"})
    write_run(tmp_path / "a", "derived", 0.1, 0, 3.0, {"rules_hash": "old"})
    write_run(tmp_path / "b", "derived", 0.01, 0, 9.0, {"rules_hash": "new"})
    assert len(load_settings(tmp_path / "a")[0].runs) == 2
    with pytest.raises(ValueError, match=r"arm='derived' has runs of 2 versions of its rules: .*move one away"):
        load_settings(tmp_path / "a", tmp_path / "b")


def test_divergences_are_counted_and_leave_no_difference(tmp_path: Path) -> None:
    folder = write_grid(tmp_path)
    for seed in range(3):
        write_run(folder, "third", 0.01, seed, 1.0, state="diverged" if seed == 1 else "finished")
        write_run(folder, "third", 0.1, seed, 1.0, state="diverged")
    (setting,) = load_settings(folder)
    third = next(one for one in compare(setting.runs) if one.arm == "third")
    assert (third.n, third.diverged, third.diverged_anywhere, third.lr) == (2, 1, 4, 0.01)
    assert third.difference is None and math.isnan(third.p) and math.isnan(third.p_corrected)


def test_a_bootstrap_interval_covers_what_it_says() -> None:
    draw = np.random.default_rng(0)
    samples = [draw.exponential(size=8) - 1 for _ in range(300)]
    bootstrapped = np.mean([not bootstrap_interval(x, resamples=500).excludes_zero for x in samples])
    assert 0.89 < bootstrapped < 0.99
    assert bootstrapped > np.mean([not t_interval(x).excludes_zero for x in samples])


def test_small_or_equal_samples_get_a_t_interval() -> None:
    assert bootstrap_interval([1.0, 2.0, 4.0]) == t_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval([2.0] * 9).half == 0
    eight = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 5.0]
    assert bootstrap_interval(eight) == bootstrap_interval(eight) != t_interval(eight)


def test_sign_flips_by_hand() -> None:
    # Of the eight patterns of signs, only the two with all signs alike reach a sum of 6.
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    # |1 - 2 + 3| = 2; six of eight sums are at least 2 in size: 6, 4, 2 and their negatives.
    assert sign_flip_p([1.0, -2.0, 3.0]) == 0.75
    assert sign_flip_p([0.5] * 8) == 2 / 256
    for values in ([], [math.nan], [1.0] * 21):
        with pytest.raises(ValueError, match="1 to 20 finite numbers"):
            sign_flip_p(values)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_runs_on_different_data_are_no_setting(tmp_path: Path) -> None:
    folder = write_grid(tmp_path)
    write_run(folder, "sgd", 0.01, 0, 3.0, data_fingerprint="a" * 16)
    assert len(load_settings(folder)) == 1, "runs from before it was recorded do not count"
    run = write_run(folder, "lion", 0.01, 0, 3.0, data_fingerprint="b" * 16)
    with pytest.raises(ValueError, match=f"{run.name} has bbbb"):
        load_settings(folder)
