"""Rules as files: what is shipped, what round-trips, and what is refused by name, by us and by the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimizer import Role, Rules, Unit
from optimizer.partition.overrides import Override
from optimizer.partition.rules import shipped
from optimizer.partition.schema import SCHEMA_FILE, json_schema

EXPECTED = {
    "adam_mini",
    "adam_mini_v1_0",
    "short_run",
    "pytorch_default",
    "slim_adam",
    "elementwise",
    "derived",
    "derived_blocks",
    "factored",
}


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


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"schema_version": 99}, ["99", "reads version 2"]),
    ({"schema_version": 1}, ["schema_version=1", "reads version 2"]),
    ({"schema_version": True}, ["True", "version"]),
    ({"schema_version": "DROP"}, ["schema_version"]),
    ({"name": "DROP"}, ["missing", "name"]),
    ({"name": 3}, ["name", "3", "string"]),
    ({"units": {"QUARY": "TENSOR"}}, ["QUARY", "did you mean 'QUERY'", "MLP_IN"]),
    ({"units": {"QUERY": "HEADS"}}, ["QUERY", "HEADS", "ATTENTION_HEAD"]),
    ({"units": {"QUERY": ["TENSOR"]}}, ["QUERY", "['TENSOR']"]),
    ({"units": {"MLP_IN": "ATTENTION_HEAD"}}, ["MLP_IN", "OUT_NEURON"]),
    ({"units": ["QUERY"]}, ["units"]),
    ({"nmae": 1}, ["nmae", "provenance"]),
    ({"overrides": {"*.weight": "TENSOR"}}, ["overrides", "list", "pattern"]),
    ({"overrides": ["*.weight"]}, ["overrides[0]", "'*.weight'", "'pattern' and 'unit'"]),
    ({"overrides": [{"pattern": "*", "unit": "TENSOR"}, {"pattern": "*.w"}]}, ["overrides[1]", "'*.w'", "'unit'"]),
    ({"overrides": [{"pattern": "*", "unit": "TENSOR", "why": ""}]}, ["overrides[0]", "why"]),
    ({"overrides": [{"pattern": 7, "unit": "TENSOR"}]}, ["overrides[0]", "7", "string"]),
    ({"overrides": [{"pattern": "", "unit": "TENSOR"}]}, ["overrides[0]", "''", "string"]),
    ({"overrides": [{"pattern": "*.w", "unit": "ROW"}]}, ["overrides[0]", "'*.w'", "'ROW'", "OUT_NEURON"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_files_are_named(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "r.json", **changes)
    with pytest.raises(ValueError) as error:
        Rules.load(path)
    assert [word for word in [*words, str(path)] if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"schema_version": 2, "name": "mine", "units": {"QUERY": "TENSOR", "QUERY": "ELEMENT"}}', "QUERY"),
        ('{"schema_version": 2, "name": "mine", "units": {}, "units": {"QUERY": "ELEMENT"}}', "units"),
        ('{"schema_version": 2, "name": "mine", "units": {}, "evidence": {"a": [{"z": 1, "z": 2}]}}', "z"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, key: str) -> None:
    """The last one won without a word, so a file could say one thing to its reader and another to the optimizer."""
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"r\.json is not valid JSON \(the key '{key}' is there 2 times: keep one"):
        Rules.load(path)


SCHEMA = jsonschema.Draft202012Validator(json_schema())


def test_the_published_schema_is_the_one_of_these_words() -> None:
    """`python -m optimizer schema > optimizer/partition/rules/schema/rules.schema.json` writes it again."""
    published = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    assert published == json_schema()
    assert set(published["properties"]["units"]["properties"]) == {role.value for role in Role}
    assert SCHEMA_FILE.stem not in shipped()


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_what_we_refuse_the_schema_refuses(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    document = json.loads(write(tmp_path / "r.json", **changes).read_text())
    if document.get("schema_version") is not True:  # to JSON Schema in Python, True is 1
        assert not SCHEMA.is_valid(document)


def test_what_we_ship_and_save_the_schema_takes(tmp_path: Path) -> None:
    for name in shipped():
        document = json.loads((SCHEMA_FILE.parents[1] / f"{name}.json").read_text())
        SCHEMA.validate(document)
        assert document["schema_version"] == 2
    derived = Rules("derived").override({"*.lm_head.weight": Unit.ELEMENT})
    saved = json.loads(derived.save(tmp_path / "d.json").read_text())
    SCHEMA.validate(saved)
    assert saved["evidence"] == Rules("derived").evidence and saved["provenance"] == Rules("derived").provenance


def test_overrides_round_trip_in_order(tmp_path: Path) -> None:
    rules = Rules("slim_adam").override({"*.wq.weight": "ELEMENT", "*.w?.weight": Unit.TENSOR})
    assert rules.overrides == (Override("*.wq.weight", Unit.ELEMENT), Override("*.w?.weight", Unit.TENSOR))
    loaded = Rules.load(rules.save(tmp_path / "r.json"))
    assert loaded == rules and hash(loaded) == hash(rules) and loaded.overrides == rules.overrides
    assert Rules("slim_adam").overrides == (), "the rules it came from are left alone"


def test_the_first_match_wins_and_new_patterns_go_first() -> None:
    rules = Rules("adam_mini").override({"layers.0.*": Unit.TENSOR, "layers.*.wq.weight": Unit.ELEMENT})
    assert rules.unit_for("layers.0.wq.weight", Role.QUERY) is Unit.TENSOR
    assert rules.unit_for("layers.1.wq.weight", Role.QUERY) is Unit.ELEMENT
    assert rules.unit_for("layers.1.wk.weight", Role.KEY) is Unit.ATTENTION_HEAD
    assert rules.unit_for("", Role.QUERY) is Unit.ATTENTION_HEAD, "no name, no override"
    newer = rules.override({"*.wq.weight": Unit.OUT_NEURON})
    assert newer.unit_for("layers.0.wq.weight", Role.QUERY) is Unit.OUT_NEURON
    assert newer.unit_for("layers.0.wk.weight", Role.KEY) is Unit.TENSOR
    assert newer.replace("mine", {"KEY": "ELEMENT"}).overrides == newer.overrides


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.lm_head.weight", "lm_head.weight", True),
        ("*.lm_head.weight", "model.lm_head.weight", True),
        ("*.lm_head.weight", "my_lm_head.weight", False),
        ("lm_head.weight", "model.lm_head.weight", False),
        ("lm_head.weight", "module._orig_mod.lm_head.weight", True),
        ("module.lm_head.weight", "lm_head.weight", True),
        ("layers.*.weight", "layers.3.attention.wq.weight", True),
        ("layers.[0-2].*", "layers.3.wq", False),
        ("*.WQ.*", "layers.3.wq.weight", False),
        ("layers", "layers.3", False),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert Override(pattern, Unit.TENSOR).matches(name) is matches


def test_equality_and_hash_know_overrides() -> None:
    plain = Rules("adam_mini")
    one, other = ({"a.*": Unit.ELEMENT}, {"b.*": Unit.ELEMENT})
    assert plain.override(one) != plain and plain.override(one) == plain.override({"a.*": "ELEMENT"})
    assert plain.override({**one, **other}) != plain.override({**other, **one}), "order decides, so it counts"
    assert len({plain, plain.override(one), plain.override(other), Rules("adam_mini")}) == 3


def test_diff_names_roles_patterns_and_order() -> None:
    left = Rules("adam_mini").override({"a.*": Unit.ELEMENT, "b.*": Unit.TENSOR, "c.*": Unit.TENSOR})
    right = Rules("short_run").override({"b.*": Unit.ELEMENT, "a.*": Unit.ELEMENT})
    text = str(left.diff(right)).splitlines()
    assert text == [
        "role VALUE: OUT_NEURON -> TENSOR",
        "override b.*: TENSOR -> ELEMENT",
        "override c.*: TENSOR -> (none)",
        "order overrides: a.* > b.* -> b.* > a.*",
    ]
    assert not left.diff(left) and str(left.diff(left)) == ""
    twice = Rules("adam_mini").override({"a.*": Unit.ELEMENT}).override({"a.*": Unit.ELEMENT})
    assert not twice.diff(Rules("adam_mini").override({"a.*": Unit.ELEMENT})), "a pattern counts once"


@pytest.mark.parametrize(
    ("given", "words"),
    [({"*.w": "ROW"}, "'ROW'.*OUT_NEURON"), ({3: Unit.TENSOR}, "pattern 3"), ({"": Unit.TENSOR}, "pattern ''"),
     ("*.w", r"override\('\*\.w'\)")],
)  # fmt: skip
def test_bad_overrides_from_code(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules("adam_mini").override(given)


def test_missing_and_malformed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*make hessian"):
        Rules.load(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text('{"schema_version": 1, "na')
    with pytest.raises(ValueError, match=r"torn\.json.*not valid JSON"):
        Rules.load(tmp_path / "torn.json")
    with pytest.raises(ValueError, match=r"adam_minni.*shipped"):
        Rules("adam_minni")
