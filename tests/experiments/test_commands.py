"""Commands beside ``experiments.train``: a value they cannot use is one line and code 2, before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from experiments import ablation, grids, runner
from experiments.studies import predicted_cost
from experiments.studies.hessian_maps import __main__ as hessian_maps
from experiments.studies.hessian_maps import ship
from experiments.studies.low_bit_moments import __main__ as low_bit
from optimizer import Rules

ROOT = Path(__file__).resolve().parents[2]


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any, *arguments: str) -> str:
    """What a command says on stderr when it refuses."""
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        command()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "workers=0 must be at least 1"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--arms", "adam"], "arms=['adam'] are unknown"),
        (["--keep", "0"], "keep=0 must be at least 1"),
        (["--results", "/proc/nowhere"], "results=/proc/nowhere cannot be written"),
        (["--cluster", "slurm", "--time", "0"], "time=0 must be at least 1"),
        (["--cluster", "slurm", "--limit", "30"], "limit=30 is for runs on this machine; on Slurm use --time"),
        (["--limit", "0"], "limit=0.0 must be positive"),
        (["--only", "muon"], "only='muon' is found in no run"),
        (["--cluster", "slurm", "--extra", "qos"], "extra=['qos'] must be KEY=VALUE"),
    ],
)
def test_ablation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = refused(monkeypatch, capsys, ablation.command, "--profile", "smoke", *arguments)
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_ablation_names_a_damaged_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = grids.grid("smoke")[0].with_rules_hash()
    folder = tmp_path / first.experiment / first.hash
    folder.mkdir(parents=True)
    (folder / "status.json").write_text("[]")
    said = refused(monkeypatch, capsys, ablation.command, "--profile", "smoke", "--results", str(tmp_path))
    assert f"{folder / 'status.json'} is damaged" in said and "Traceback" not in said


def test_studies_need_a_folder_they_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "x")
    for main, option in ((hessian_maps.main, "--out"), (low_bit.main, "--results")):
        said = refused(monkeypatch, capsys, lambda main=main: tyro.cli(main), option, inside)
        assert f"{option[2:]}={inside} cannot be written" in said and said.count("\n") == 1
    said = refused(monkeypatch, capsys, lambda: tyro.cli(predicted_cost.main), "--out", f"{inside}/cost.json")
    assert f"out={inside} cannot be written" in said and said.count("\n") == 1


def test_a_damaged_stage_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "final.json").write_text("[]")
    arguments = ("--results", str(tmp_path), "--only", "final")
    said = refused(monkeypatch, capsys, lambda: tyro.cli(low_bit.main), *arguments)
    assert "final.json is damaged (it has no runs); move the file away" in said


def test_only_a_finished_study_is_shipped(tmp_path: Path) -> None:
    """Its rules are written before the runs that check them, so rules alone are those of an interrupted study."""
    rules = Rules("mine", {"QUERY": "OUT_NEURON"}, evidence={"choices": {}, "table": [1]})
    rules.save(tmp_path / "rules.json")
    target = tmp_path / "derived.json"
    with pytest.raises(ValueError, match=r"is not finished: .*report\.json does not exist; run `make hessian`"):
        ship.ship(tmp_path, target)
    for report in ({}, [], {"rules": {"units": {"QUERY": "TENSOR"}}}):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match=r"report\.json is of other rules"):
            ship.ship(tmp_path, target)
    assert not target.exists()
    units = {role.value: unit.value for role, unit in rules.units.items()}
    (tmp_path / "report.json").write_text(json.dumps({"rules": {"units": units}}))
    assert Rules.load(ship.ship(tmp_path, target)).evidence == {"choices": {}}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"seed": 1, "seed": 2}', '{"format_version": 1}'])
def test_a_config_file_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    said = refused(monkeypatch, capsys, lambda: tyro.cli(runner.main), str(path), str(tmp_path))
    assert str(path) in said and said.count("\n") == 1


def test_a_config_file_that_is_none_is_named_from_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    command = [sys.executable, "-m", "experiments.runner", str(path), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and str(path) in done.stderr and "Traceback" not in done.stderr
