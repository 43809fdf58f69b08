"""Rules as files: what is shipped, what round-trips, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer import Role, Rules, Unit
from optimizer.partition.rules import shipped

EXPECTED = {"adam_mini", "adam_mini_v1_0", "short_run", "pytorch_default", "slim_adam", "elementwise", "derived"}


def test_every_shipped_set_is_complete() -> None:
    assert set(shipped()) == EXPECTED
    for name in shipped():
        rules = Rules(name)
        assert rules.name == name and set(rules.units) == set(Role) and rules.description


def test_the_paper_s_table() -> None:
    rules = Rules("adam_mini")
    assert rules[Role.QUERY] is rules[Role.KEY] is Unit.ATTENTION_HEAD
    assert (
        rules[Role.VALUE] is rules[Role.MLP_IN] is rules[Role.MLP_OUT] is rules[Role.ATTENTION_OUT] is Unit.OUT_NEURON
    )
    assert rules[Role.TOKEN_EMBEDDING] is rules[Role.HEAD] is Unit.TOKEN
    assert (rules[Role.NORM], rules[Role.BIAS], rules[Role.OTHER]) == (Unit.TENSOR, Unit.ELEMENT, Unit.TENSOR)
    assert Rules("short_run")[Role.VALUE] is Unit.TENSOR
    assert Rules("slim_adam")[Role.VALUE] is Unit.IN_NEURON and Rules("slim_adam")[Role.QUERY] is Unit.OUT_NEURON


def test_round_trip(tmp_path: Path) -> None:
    rules = Rules("mine", {"QUERY": "OUT_NEURON"}, evidence={"z": 7.5}, provenance={"seed": 0})
    loaded = Rules.load(rules.save(tmp_path / "deep" / "mine.json"))
    assert loaded == rules and loaded.evidence == {"z": 7.5} and loaded.name == "mine"
    assert loaded[Role.KEY] is Unit.ATTENTION_HEAD, "a missing role takes adam_mini's unit"
    assert not list(tmp_path.rglob("*.tmp"))


def write(path: Path, **changes: object) -> Path:
    document = {**Rules("adam_mini").to_dict(), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "DROP"}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 99}, ["99", "version"]),
        ({"schema_version": "DROP"}, ["schema_version"]),
        ({"units": {"QUARY": "TENSOR"}}, ["QUARY", "QUERY"]),
        ({"units": {"QUERY": "HEADS"}}, ["HEADS", "ATTENTION_HEAD"]),
        ({"units": {"MLP_IN": "ATTENTION_HEAD"}}, ["MLP_IN", "OUT_NEURON"]),
        ({"units": ["QUERY"]}, ["units"]),
        ({"nmae": 1}, ["nmae"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, changes, words) -> None:
    path = write(tmp_path / "r.json", **changes)
    with pytest.raises(ValueError) as error:
        Rules.load(path)
    assert all(word in str(error.value) for word in [*words, str(path)])


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*make hessian"):
        Rules.load(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text('{"schema_version": 1, "na')
    with pytest.raises(ValueError, match=r"torn\.json.*not valid JSON"):
        Rules.load(tmp_path / "torn.json")
    with pytest.raises(ValueError, match=r"adam_minni.*shipped"):
        Rules("adam_minni")
