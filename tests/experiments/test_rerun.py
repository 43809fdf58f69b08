"""A stored run is run again by its hash: equal numbers pass, others are refused, and nothing stored is touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.configs import smoke
from experiments.rerun import main
from experiments.storage import read_json, write_json
from experiments.train import run_folder, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = replace(smoke(), steps=4, eval_every=4).with_rules_hash()
    train(config, tmp_path / "results")
    return run_folder(tmp_path / "results", config)


def change(folder: Path, file: str, **values: object) -> None:
    write_json(folder / file, {**read_json(folder / file), **values})


def test_a_run_gives_the_same_number_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    main(folder.name[:6], folder.parents[1], tmp_path / "again")
    assert "difference 0.000000 (allowed: 0.002)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "again" / "smoke" / folder.name / "status.json").is_file()


def test_an_earlier_repetition_is_no_result(folder: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "again" / "smoke" / folder.name
    shutil.copytree(folder, earlier)
    change(earlier, "status.json", final_val_loss=99.0)
    main(folder.name, folder.parents[1], tmp_path / "again")
    assert read_json(earlier / "status.json")["final_val_loss"] != 99.0


def test_another_number_or_end_is_no_reproduction(folder: Path, tmp_path: Path) -> None:
    stored = read_json(folder / "status.json")["final_val_loss"]
    for changed in ({"final_val_loss": stored + 0.01}, {"state": "diverged", "final_val_loss": None}):
        change(folder, "status.json", **changed)
        with pytest.raises(SystemExit) as ended:
            main(folder.name, folder.parents[1], tmp_path / "again")
        assert ended.value.code == 1


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("", "ffffffffffff"):
        with pytest.raises(SystemExit, match=f"run='{name}' names 0 runs"):
            main(name, folder.parents[1], tmp_path / "again")
    change(folder, "config.json", rules_hash="0123456789ab")
    with pytest.raises(SystemExit, match="today and had 0123456789ab then"):
        main(folder.name, folder.parents[1], tmp_path / "again")
    change(folder, "status.json", state="interrupted")
    with pytest.raises(SystemExit, match="has not ended"):
        main(folder.name, folder.parents[1], tmp_path / "again")
