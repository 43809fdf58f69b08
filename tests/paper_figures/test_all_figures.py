"""`make figures`: every figure as PNG and PDF, from the results, and no missing result passes in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from analysis import hessian_maps, paper_hessian, studies
from paper_figures import __main__ as figures
from paper_figures import kept_maps, study
from tests.analysis.runs import write_grid, write_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def test_missing_results_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = dict(figures.STEPS)
    for name, words in (
        ("ablation", "make ablation"),
        ("carry over", "make ablation"),
        ("every study", "make ablation"),
        ("suite", "rivals_cpu does not exist"),
        ("workloads", "make workloads PROFILE=cpu"),
        ("Hessian maps", "run `make hessian`"),
        ("role study", "experiments.studies.role_study"),
        ("real model", "make real-model"),
        ("paper's Hessian", "experiments.studies.paper_hessian --only quadratics"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(figures, "STEPS", {name: steps[name]})
            figures.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1, said


def test_each_part_of_the_papers_hessian_is_needed(tmp_path: Path) -> None:
    folder = shutil.copytree(RESULTS / "paper_hessian", tmp_path / "paper_hessian")
    (folder / "spectra.json").unlink()
    only = {"paper's Hessian": figures.STEPS["paper's Hessian"]}
    missing = r"(structure|spectra).json does not exist; run `python -m exp"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=missing):
        patch.setattr(figures, "STEPS", only)
        figures.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "structure" in paper_hessian.PARTS and not list((tmp_path / "out").iterdir())


def test_a_figure_without_its_twin_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.pdf", "b.png"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"b.pdf is missing"):
        figures.complete(tmp_path)
    (tmp_path / "b.pdf").write_text("")
    assert figures.complete(tmp_path) == [tmp_path / "a.png", tmp_path / "b.png"]


def test_a_study_is_drawn_from_its_runs(tmp_path: Path) -> None:
    found = studies.load(write_grid(tmp_path / "grid"))
    rows = studies.table(found).set_index(["arm", "lr"])
    figure = study.draw(found)
    left, right = figure.axes
    drawn = left.containers[0].lines[0]
    assert drawn.get_xdata().tolist() == [0.001, 0.01]
    expected = [rows.loc["adam_mini", lr].difference.mean for lr in (0.001, 0.01)]
    assert drawn.get_ydata().tolist() == pytest.approx(expected)
    points = {c.get_label(): (c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in right.containers}
    assert points["adam_mini"] == pytest.approx((4.2, rows.loc["adam_mini", 0.01].loss.mean))
    assert points["AdamW (elementwise)"][0] == 8.0  # bytes per parameter: two fp32 moments
    plt.close(figure)


def test_a_study_has_a_row_per_condition_and_arms_of_any_name(tmp_path: Path) -> None:
    for warmup in (0.1, 0.02):
        for arm in ("elementwise", "muon"):
            write_run(tmp_path / "new", arm, 0.01, 0, 2.0, {"warmup": warmup})
    path = study.write(studies.load(tmp_path / "new"), tmp_path / "out")
    assert path.name == "study_new.png" and figures.complete(tmp_path / "out") == [path]
    figure = study.draw(studies.load(tmp_path / "new"))
    assert len(figure.axes) == 4
    plt.close(figure)


def test_maps_are_drawn_from_the_committed_ones(tmp_path: Path) -> None:
    document = hessian_maps.load(RESULTS / "hessian_maps")
    small = {**document, "subjects": {"mlp": document["subjects"]["mlp"]}}
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(
            kept_maps, "draw_matrix", lambda axes, matrix, borders, title: kept.append((matrix, borders, title))
        )
        paths = kept_maps.write(small, tmp_path)
    assert figures.complete(tmp_path) == paths and len(kept) == 2
    for matrix, borders, title in kept:
        assert np.array_equal(matrix, matrix.T) and (matrix > 0).all() and borders and "z = " in title
