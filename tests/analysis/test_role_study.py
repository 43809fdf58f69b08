"""Statistics of a role study whose answer is known: one criterion is the gap itself, up to a factor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis import role_study
from analysis.role_study import FIT, HELD_OUT
from tests.analysis.role_results import SLOPE, edit, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("role_study"), surprise=0.25)


@pytest.fixture(scope="module")
def study(folder: Path) -> role_study.Study:
    return role_study.load(folder)


def test_the_winner_is_the_criterion_that_is_the_gap(study: role_study.Study) -> None:
    best, scores = role_study.winner(study)
    assert best == "good" and scores["good"] == pytest.approx(1) and abs(scores["bad"]) < 0.5
    assert scores["scalars"] == pytest.approx(1), "it is as good, but blind"
    assert scores["constant"] == 0


def test_correlations_slopes_and_intervals(study: role_study.Study) -> None:
    cells = list(role_study.blocks(study, *HELD_OUT).values())
    found, columns = role_study.correlations(cells, resamples=50), role_study.names(study)
    good, bad = columns.index("good"), columns.index("bad")
    assert found.n == 2 * 33 and found.rank[good] == pytest.approx(1) and found.slope[good] == pytest.approx(SLOPE)
    assert found.rank_interval[:, good] == pytest.approx([1, 1]) and found.slope_interval[:, good] == pytest.approx(
        SLOPE
    )
    low, high = found.rank_interval[:, bad]
    assert low <= found.rank[bad] <= high and high - low > 0.1
    assert role_study.ceiling(cells) == pytest.approx(1)


def test_spearman_and_slopes_by_hand() -> None:
    criteria = np.array([[1.0, 3.0, 5.0], [2.0, 2.0, 5.0], [9.0, 1.0, 5.0]])
    assert role_study.spearman(criteria, np.array([1.0, 2.0, np.inf])) == pytest.approx([1, -1, 0])
    assert role_study.slopes(criteria, np.array([1.0, 3.0, np.inf])) == pytest.approx([2, -2, 0])


def test_regret(study: role_study.Study) -> None:
    cells = list(role_study.blocks(study, *FIT).values())
    columns = role_study.names(study)
    of_criteria, of_sets = role_study.regrets(cells)
    assert of_criteria[columns.index("good")] == pytest.approx(0) and of_criteria[columns.index("bad")] > 0.005
    assert set(of_sets) == set(role_study.WHOLE_SETS) and min(of_sets.values()) > 0
    blocks_only, without = role_study.regrets(cells, factored=False)
    assert blocks_only[columns.index("good")] == pytest.approx(0) and set(without) == {
        "adam_mini",
        "derived_blocks",
        "derived_row",
    }
    cell = cells[0]
    gap, by_hand = cell.gap.mean(0), []
    for role in dict.fromkeys(cell.roles):
        arms = [i for i, r in enumerate(cell.roles) if r == role]
        unit = role_study.WHOLE_SETS["adam_mini"][role]
        by_hand += [gap[cell.arms.index(f"{role}/{unit}")] - gap[arms].min()] if len(arms) > 1 else []
    assert role_study.regrets([cell])[1]["adam_mini"] == pytest.approx(np.mean(by_hand))


def test_the_bootstrap_draws_roles_as_well_as_seeds(tmp_path: Path) -> None:
    study = role_study.load(write_study(tmp_path, seeds=(0,)))
    cells = list(role_study.blocks(study, *FIT).values())
    low, high = role_study.correlations(cells, resamples=50).rank_interval[:, role_study.names(study).index("bad")]
    assert high - low > 0.05, "with a single seed, only roles can vary"
    assert math.isnan(role_study.ceiling(cells))


def test_additivity_and_noise(study: role_study.Study) -> None:
    table = role_study.additivity(study)
    assert len(table) == 8 * 5
    assert all(x.mean == pytest.approx(0.25) and x.half == pytest.approx(0, abs=1e-9) for x in table.difference)
    twins = role_study.noise(study)
    assert len(twins) == 8
    assert all(x.mean == pytest.approx(0, abs=1e-9) and x.half > 1e-5 for x in twins.values())


def test_difference_of_two_arms(study: role_study.Study) -> None:
    whole = role_study.difference(study, "derived_blocks", "adamw")
    by_hand = study.gaps[study.gaps.arm == "derived_blocks"].gap.mean()
    assert whole.mean == pytest.approx(by_hand) and whole.n == 3 and whole.half == pytest.approx(0, abs=1e-9)
    twin = role_study.difference(study, "adamw", "twin", mixed=True, lr=1e-2)
    assert twin.mean == pytest.approx(0, abs=1e-9) and twin.half > 1e-5
    table = study.gaps
    part = table[
        (table.arm == "derived_blocks") & (table.lr == 1e-2) & (table.model == "llama") & (table.data == "enwik8")
    ]
    rest = table[
        (table.arm == "derived_blocks") & (table.lr == 1e-2) & (table.model == "gpt") & (table.data != "enwik8")
    ]
    mixed = role_study.difference(study, "derived_blocks", "adamw", mixed=True, lr=1e-2)
    assert mixed.mean == pytest.approx((part.gap.mean() + rest.gap.mean()) / 2)
    with pytest.raises(ValueError, match=r"no runs of .*'derivde'"):
        role_study.difference(study, "derivde", "adamw")


def test_incomplete_seeds_are_left_out(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    edit(folder, "gpt-enwik8-0.003-2", "twin", None, remove=True)
    study = role_study.load(folder)
    cells = role_study.blocks(study, *HELD_OUT)
    assert cells[3e-3].seeds == [0, 1] and cells[1e-2].seeds == [0, 1, 2]
    assert role_study.correlations(list(cells.values()), resamples=5).rank[0] == pytest.approx(1)


def test_a_role_can_be_left_out(study: role_study.Study) -> None:
    cell = role_study.blocks(study, *FIT)[1e-2]
    rest = role_study.without(cell, "HEAD")
    assert len(rest.arms) == len(cell.arms) - 4 and "HEAD" not in rest.roles
    at = cell.arms.index("NORM/TENSOR")
    assert rest.gap[:, rest.arms.index("NORM/TENSOR")] == pytest.approx(cell.gap[:, at])
    assert rest.criteria.shape == (3, len(rest.arms), 4)


def test_a_diverged_arm_ranks_last(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    edit(folder, "gpt-enwik8-0.003-1", "KEY/FACTORED", None)
    study = role_study.load(folder)
    cell = role_study.blocks(study, *HELD_OUT)[3e-3]
    assert math.isinf(cell.gap.mean(0)[cell.arms.index("KEY/FACTORED")])
    found = role_study.correlations([cell], resamples=5)
    assert 0 < found.rank[0] < 1 and found.slope[0] == pytest.approx(SLOPE)
    edit(folder, "gpt-enwik8-0.003-1", "adamw", None)
    with pytest.raises(ValueError, match="adamw diverged"):
        role_study.load(folder)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        role_study.load(tmp_path)
    folder = write_study(tmp_path)
    text = (folder / "criteria.json").read_text()
    (folder / "criteria.json").write_text(text.replace('"NORM/TENSOR"', '"NORM/TOKEN"'))
    with pytest.raises(ValueError, match=r"criteria\.json lacks arms"):
        role_study.winner(role_study.load(folder))
    edit(folder, "gpt-enwik8-0.003-1", "twin", float("nan"))
    with pytest.raises(ValueError, match="'twin' has final_val_loss=nan"):
        role_study.load(folder)
