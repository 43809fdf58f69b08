"""Stored results in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.analysis.runs import write_grid, write_run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_grid(tmp_path / "grid")
    write_run(tmp_path / "grid", "adam_mini", 0.1, 0, 1.0, state="diverged")
    write_run(tmp_path / "other", "adam_mini", 0.1, 0, 1.0)
    (tmp_path / "figures").mkdir()
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(["show", *arguments])
    return capsys.readouterr().out.splitlines()


def test_experiments_are_listed_with_the_states_of_their_runs(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = results / "grid" / "0123456789ab"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    lines = [line.split(maxsplit=1) for line in shown(capsys, "--results", str(results))]
    assert lines == [["grid", "1 diverged, 12 finished, 1 not finished"], ["other", "1 finished"]]


def test_one_experiment_is_a_table_of_arms_and_rates(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, first, second, *rest = shown(capsys, "grid", "--results", str(results))
    assert header.split() == ["arm", "0.001", "0.01", "0.1", "scalars"]
    assert first.split()[0] == "elementwise" and first.split()[-1] == "1,000" and first.split()[-2] == "-"
    assert second.split()[0] == "adam_mini" and "1 diverged" in second and second.count("*") == 1
    assert "±1.0000 (3)*" in first and first.index("*") > first.index("(3)")
    assert "best rate" in rest[-1]


def test_curves_of_runs_by_name(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "grid", "adam_mini 0.01", "--results", str(results))
    assert [line.split()[:3] for line in lines[:3]] == [["adam_mini", "0.01", str(seed)] for seed in range(3)]
    assert "█" in "".join(lines[:3]) and "▁" in "".join(lines[:3]) and lines[-2].startswith("validation loss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no results under"),
        (["grid", "muon"], "runs='muon' is in no name of a run; names are like 'adam_mini 0.001 0'"),
    ],
)
def test_what_is_not_there_is_one_line(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments, "--results", str(results)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--results", str(tmp_path)])
    assert f"no training runs under {tmp_path}" in capsys.readouterr().err


def test_a_diverged_run_may_lack_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "grid", "adam_mini", 0.1, 0, 1.0, state="diverged")
    (run / "metrics.jsonl").write_text('{"step": 10, "val_loss": 2.0}\n{"step": 20, "val_loss": null}\n{"step": 30}\n')
    lines = shown(capsys, "grid", "adam_mini", "--results", str(tmp_path))
    assert lines[0].split() == ["adam_mini", "0.1", "0", "▁xx", "diverged", run.name]


def test_conditions_have_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for clip in (0.0, 1.0):
        write_run(tmp_path / "map", "adam_mini", 0.1, 0, 2.0 + clip, {"clip": clip})
    lines = shown(capsys, "map", "--results", str(tmp_path))
    assert [line for line in lines if line.startswith("clip")] == ["clip 0", "clip 1"]
    assert sum("2.0000 (1)*" in line for line in lines) == sum("3.0000 (1)*" in line for line in lines) == 1
    (one, *_) = shown(capsys, "map", "clip 1", "--results", str(tmp_path))
    assert one.startswith("adam_mini 0.1 0 clip 1 ") and "3.0000" in one
