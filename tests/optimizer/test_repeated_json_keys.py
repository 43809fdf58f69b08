"""JSON that users write, wherever it is read: a key that stands twice is named, never silently the last one."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.integrations.deepspeed import config_for_adam_mini
from optimizer.partition.documents import parse_json


def test_what_has_no_key_twice_is_plain_json() -> None:
    assert parse_json('{"a": [{"b": 1}, {"b": 2}], "c": NaN}')["a"] == [{"b": 1}, {"b": 2}]


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"x": {"a": 1, "b": 2, "a": 3}}]'])
def test_a_key_that_stands_twice_is_named_at_any_depth(text: str) -> None:
    with pytest.raises(ValueError, match="the key 'a' is there 2 times: keep one"):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"bf16": {"enabled": true}, "bf16": {}}', "'bf16' is there 2 times"), ("{", "not valid JSON"),
     ("[]", "holds a JSON list, not an object")],
)  # fmt: skip
def test_deepspeeds_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"ds\.json .*{message}"):
        config_for_adam_mini(path)
    path.write_text('{"bf16": {"enabled": true}}')
    assert config_for_adam_mini(str(path))["zero_allow_untested_optimizer"] is True
