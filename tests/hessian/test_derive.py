"""From evidence to rules: the decision rule does what it says, and its file drives an optimizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hessian import Evidence, derive, factored_gap, jensen_gap
from optimizer import AdamMini, Role, Rules, Unit


def row(
    unit: str, jensen: float, z: float = 50.0, role: str = "QUERY", checkpoint: float = 1.0, blocks: int = 4
) -> Evidence:
    return Evidence("m", "t", role, unit, checkpoint, 256, blocks, 0.5, 0.25, z, 3.0, jensen, 1.0)


def test_jensen_gap_by_hand() -> None:
    v = torch.tensor([1.0, 1.0, 4.0, 4.0])
    assert jensen_gap(v, torch.tensor([0, 0, 1, 1]))[0] == pytest.approx(0, abs=1e-12)
    whole = torch.log(torch.tensor(2.5)) - 0.5 * torch.log(torch.tensor(4.0))
    assert jensen_gap(v, torch.zeros(4, dtype=torch.int64))[0] == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("ids", [[0, 0, 2, 2], [1, 1, 2, 2], [-1, 0, 1, 1]])
def test_jensen_gap_refuses_ids_with_holes(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="renumber"):
        jensen_gap(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(ids))


def test_jensen_gap_refuses_ids_of_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"int32.*long\(\)"):
        jensen_gap(torch.ones(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("permutations", [0, -1])
def test_jensen_gap_needs_a_null(permutations: int) -> None:
    with pytest.raises(ValueError, match=f"permutations={permutations}"):
        jensen_gap(torch.ones(2), torch.zeros(2, dtype=torch.int64), permutations=permutations)


def test_jensen_gap_takes_tensors() -> None:
    with pytest.raises(TypeError, match="block_ids a list"):
        jensen_gap(torch.ones(2), [0, 0])
    with pytest.raises(ValueError, match="not all zero"):
        jensen_gap(torch.ones(0), torch.ones(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jensen": float("nan")}, r"evidence\[1\].*jensen=nan"),
        ({"z": float("nan")}, r"evidence\[1\].*z=nan"),
        ({"n_params": 0}, "n_params=0"),
        ({"role": "QUERRY"}, "role='QUERRY'"),
        ({"unit": "HEAD"}, "unit='HEAD'"),
    ],
)
def test_evidence_that_is_none_is_refused(change: dict[str, object], words: str) -> None:
    table = [row("TENSOR", 1.0, 0.0, blocks=1), dataclasses.replace(row("OUT_NEURON", 0.3, blocks=16), **change)]
    with pytest.raises(ValueError, match=words):
        derive(table)


def test_jensen_gap_against_its_null() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(20).repeat_interleave(30)
    scales = torch.exp(2 * torch.randn(20, generator=generator))
    v = scales[ids] * torch.exp(0.1 * torch.randn(600, generator=generator))
    gap, null = jensen_gap(v, ids)
    assert gap < 0.05 * null
    shuffled, null = jensen_gap(v, ids[torch.randperm(600, generator=generator)])
    assert shuffled == pytest.approx(null, rel=0.1)
    assert jensen_gap(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))[0] < 20, "a zero must not be infinite"
    for bad in (torch.tensor([-1.0, 1.0]), torch.zeros(2), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(ValueError, match="v must be"):
            jensen_gap(bad, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="3 elements"):
        jensen_gap(torch.ones(3), torch.tensor([0, 0]))


def test_a_finer_partition_must_be_worth_its_scalars() -> None:
    table = [row("TENSOR", 1.0, 0.0, blocks=1), row("ATTENTION_HEAD", 0.5), row("OUT_NEURON", 0.48, blocks=16)]
    assert derive(table)[Role.QUERY] is Unit.ATTENTION_HEAD
    table[2] = row("OUT_NEURON", 0.3, blocks=16)
    assert derive(table)[Role.QUERY] is Unit.OUT_NEURON


def test_the_gate_drops_what_the_hessian_does_not_see() -> None:
    table = [row("TENSOR", 1.0, 0.0, blocks=1), row("ATTENTION_HEAD", 0.5), row("OUT_NEURON", 0.1, z=2.0, blocks=16)]
    rules = derive(table)
    assert rules[Role.QUERY] is Unit.ATTENTION_HEAD
    assert "OUT_NEURON (z 2.0)" in rules.evidence["choices"]["QUERY"]["why"]
    nothing = [row("TENSOR", 1.0, 0.0, blocks=1), row("OUT_NEURON", 0.1, z=2.0, blocks=16)]
    assert derive(nothing)[Role.QUERY] is Unit.OUT_NEURON
    assert "no candidate passes" in derive(nothing).evidence["choices"]["QUERY"]["why"]


def test_only_trained_checkpoints_vote() -> None:
    table = [row("TENSOR", 1.0, 0.0, blocks=1), row("OUT_NEURON", 0.9999, blocks=16),
             row("OUT_NEURON", 0.01, checkpoint=0.0, blocks=16)]  # fmt: skip
    assert derive(table)[Role.QUERY] is Unit.TENSOR


def test_the_file_drives_an_optimizer(tmp_path: Path) -> None:
    table = [row("TENSOR", 1.0, 0.0, "MLP_IN", blocks=1), row("IN_NEURON", 0.1, 50.0, "MLP_IN", blocks=3)]
    path = derive(table, provenance={"seed": 0}).save(tmp_path / "rules.json")
    optimizer = AdamMini(nn.Sequential(nn.Linear(3, 4)), rules=path)
    assert optimizer.layouts[0][0].n_blocks == 3
    loaded = Rules.load(path)
    assert loaded[Role.NORM] is Unit.TENSOR and "not measured" in loaded.evidence["choices"]["NORM"]["why"]
    assert len(json.loads(path.read_text())["evidence"]["table"]) == 2 and loaded.provenance == {"seed": 0}
    with pytest.raises(ValueError, match="at least one"):
        derive([])


def test_factored_gap_is_zero_for_rank_one_and_seen_by_its_null() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, generator=generator).exp() for n in (20, 30))
    product = rows[:, None] * columns
    gap, null, z = factored_gap(product)
    assert gap == pytest.approx(0, abs=1e-6) and null > 0.3 and z > 20
    shuffled = product.flatten()[torch.randperm(600, generator=generator)].reshape(20, 30)
    gap, null, z = factored_gap(shuffled)
    assert gap == pytest.approx(null, rel=0.2) and abs(z) < 4
    assert factored_gap(torch.ones(4, 5)) == (0, 0, 0), "a constant needs no columns and is not structure"
    odd = torch.tensor([[1.0, 1.0], [1.0, 10.0]])
    assert factored_gap(odd)[0] > 0, "the mean log ratio is negative here"
    with pytest.raises(ValueError, match=r"\(4,\); a factored"):
        factored_gap(torch.ones(4))
    with pytest.raises(ValueError, match="permutations=1"):
        factored_gap(odd, permutations=1)


def test_factored_competes_if_v_has_the_form() -> None:
    blocks = [row("TENSOR", 1.0, 0.0, blocks=1), row("OUT_NEURON", 0.3, blocks=16), row("IN_NEURON", 0.1, 2.0)]
    assert derive([*blocks, row("FACTORED", 0.2, blocks=32)])[Role.QUERY] is Unit.FACTORED
    assert derive([*blocks, row("FACTORED", 0.29, blocks=32)])[Role.QUERY] is Unit.OUT_NEURON, "not worth its scalars"
    assert derive([*blocks, row("FACTORED", 0.2, z=3.0, blocks=32)])[Role.QUERY] is Unit.OUT_NEURON, "no form, no entry"
    kept = derive([*blocks, row("FACTORED", 0.2, blocks=32)], without=(Unit.FACTORED,))
    assert kept[Role.QUERY] is Unit.OUT_NEURON and len(kept.evidence["table"]) == 4
    with pytest.raises(ValueError, match="FACTORED"):
        derive([row("FACTORED", 0.2)], without=(Unit.FACTORED,))
