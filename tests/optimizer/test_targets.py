"""Every command takes every kind of target; a shipped architecture's name is one of them."""

from __future__ import annotations

import json

import pytest

from optimizer.__main__ import main
from optimizer.partition import discover
from optimizer.tools.architectures import facts, shipped
from optimizer.tools.targets import load_target

ONE_OF_A_KIND = ("gpt2-125m", "llama-2-7b", "llama-3-8b", "mixtral-8x7b", "deepseek-v3")


def test_explain_takes_a_shipped_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "llama-3-8b", "--json"])
    rows = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["parameters"]}
    assert rows["model.layers.31.self_attn.q_proj.weight"]["blocks"] == 32
    assert rows["model.layers.31.self_attn.k_proj.weight"]["blocks"] == 8


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_verify_takes_a_shipped_architecture(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", name, "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings and "proven" in {one["verdict"] for one in findings}


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_the_small_model_is_made_as_the_large_one(name: str) -> None:
    """The same names in a layer, the same roles, and grouped heads where the large one groups them."""
    large, small = load_target(name), load_target(name, small=True)
    assert sum(p.numel() for p in small.parameters()) < 400_000 and not any(p.is_meta for p in small.parameters())
    wanted, found = discover(large), discover(small)
    assert {name for name in found if name not in wanted} == set()
    for key, anatomy in found.items():
        assert (anatomy.roles, anatomy.axis, anatomy.fold) == (wanted[key].roles, wanted[key].axis, wanted[key].fold)


def test_every_shipped_architecture_has_small_sizes_of_its_own_keys() -> None:
    for name in shipped():
        document = facts(name)
        assert document["small"].keys() < document["config"].keys() | {"max_position_embeddings"}


@pytest.mark.parametrize("command", ["explain", "verify", "plan"])
def test_a_name_that_is_none_is_answered_with_those_there_are(command: str) -> None:
    with pytest.raises(SystemExit, match=r"target 'llama-9' must be written module:attribute.*llama-3-8b"):
        main([command, "llama-9"])
