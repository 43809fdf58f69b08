"""Reading a study: medians per role in reading order, and what is absent is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.hessian import HessianReport


def _row(unit: str, tensor: str, z: float, **more: Any) -> dict[str, Any]:
    row = {"model": "gpt", "tensor": tensor, "role": "QUERY", "unit": unit, "checkpoint": 1.0, "n_params": 16}
    row |= {"n_blocks": 4, "mass_inside": 0.6, "expected": 0.3, "z": z, "mean_ratio": 2.0}
    return row | {"jensen": 0.2, "jensen_null": 0.8, "snr_row": 1.0, "snr_column": 1.0, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [_row("IN_NEURON", "a", 1.0)]
    rows += [_row("ATTENTION_HEAD", tensor, z) for tensor, z in (("a", 1.0), ("b", 10.0), ("c", 4.0))]
    rows += [_row("TENSOR", "a", 0.0, expected=0.0)]
    check = [{"model": "gpt", "arm": "derived", "seed": 0, "step": [1, 2], "loss": [3.0, 2.0]}]
    report = {"format_version": 1, "evidence": rows, "check": check, "files": {"stage": "stage-1.npz"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "stage-1.npz", x=np.arange(3))
    return tmp_path


def test_medians_over_tensors_in_reading_order(folder: Path) -> None:
    table = HessianReport.load(folder).by_role("gpt")
    assert table.unit.tolist() == ["TENSOR", "ATTENTION_HEAD", "IN_NEURON"]
    assert table.n.tolist() == [1, 3, 1]
    assert table.z.tolist() == [0.0, 4.0, 1.0]
    assert table.lift.iloc[1] == pytest.approx(2.0)
    assert table.explained.iloc[1] == pytest.approx(0.75)
    assert np.isnan(table.lift.iloc[0])  # nothing expected inside: no ratio, and never a zero


def test_arrays_and_finals(folder: Path) -> None:
    report = HessianReport.load(folder)
    assert report.arrays("stage")["x"].tolist() == [0, 1, 2]
    assert report.check.final.tolist() == [2.0]
    with pytest.raises(KeyError, match="no stage 'other'"):
        report.arrays("other")


def test_unmeasured_checkpoint_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint=0\.25"):
        HessianReport.load(folder).by_role("gpt", 0.25)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make hessian"):
        HessianReport.load(tmp_path)
    (tmp_path / "report.json").write_text('{"format_version": 1')
    with pytest.raises(ValueError, match="damaged"):
        HessianReport.load(tmp_path)
    (tmp_path / "report.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version=99"):
        HessianReport.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["evidence"][0].update(z=None), r"z=None, no finite number"),
        (lambda r: r["evidence"][0].update(jensen=float("nan")), r"evidence\[0\] .a by IN_NEURON. has jensen=nan"),
        (lambda r: r["evidence"][0].pop("mass_inside"), r"mass_inside=None"),
        (lambda r: r["evidence"].append([]), r"evidence\[5\] is no object"),
        (lambda r: r.pop("check"), "it has no check"),
        (lambda r: r["check"][0].update(loss=[]), "seed=0 has no loss for each step"),
        (lambda r: r["check"][0].update(loss=[3.0]), "seed=0 has no loss for each step"),
        (lambda r: r["check"][0].update(loss=[3.0, None]), "arm=derived seed=0 has loss=None"),
        (lambda r: r["check"].append({**r["check"][0]}), "a seed twice"),
        (lambda r: r["check"].append({**r["check"][0], "arm": "adam_mini", "seed": 1}), "have the seeds"),
    ],
)  # fmt: skip
def test_a_report_with_a_hole_is_damaged(folder: Path, change: Any, message: str) -> None:
    """A null among the evidence was left out of its median, and a lost run made another n."""
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"report\.json is damaged .*{message}.*make hessian"):
        HessianReport.load(folder)


@pytest.mark.parametrize("text", ["[]", "null", '{"format_version": 1, "format_version": 1}'])
def test_a_report_that_is_no_object_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        HessianReport.load(tmp_path)


def test_an_infinite_ratio_is_a_measurement(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["evidence"][0]["mean_ratio"] = float("inf")  # all of the mass lies inside the blocks
    (folder / "report.json").write_text(json.dumps(report))
    assert HessianReport.load(folder).evidence.mean_ratio[0] == float("inf")


def test_the_file_of_a_stage_is_missing_or_cut(folder: Path) -> None:
    path = folder / "data" / "stage-1.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"stage-1\.npz is damaged.*make hessian"):
        HessianReport.load(folder).arrays("stage")
    path.unlink()
    with pytest.raises(ValueError, match=r"stage-1\.npz is missing.*make hessian"):
        HessianReport.load(folder).arrays("stage")


def test_a_part_that_the_page_needs_is_asked_for_by_name(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json is damaged .it has no settings"):
        HessianReport.load(folder).require("settings")
