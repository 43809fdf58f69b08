"""`python -m paper_figures.hessian`: what it refuses, in one line and before anything is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paper_figures.hessian import main

REPORT: dict[str, Any] = {
    "format_version": 1, "evidence": [], "check": [], "files": {"stage": "stage-1.npz"},
    **{key: {} for key in ("settings", "subjects", "js", "rules", "data", "environment")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "report.json does not exist; run `make hessian` to its end first"),
        ("[]", "report.json is damaged"),
        ('{"format_version": 1', "report.json is damaged"),
        (json.dumps({k: v for k, v in REPORT.items() if k != "settings"}), "it has no settings"),
        (json.dumps(REPORT), "stage-1.npz is missing"),
    ],
)
def test_a_study_that_is_not_whole_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["paper_figures.hessian", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "figures").exists()
