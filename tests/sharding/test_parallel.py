"""Sequence, expert and pipeline parallelism, mixed precision and offload on 2 gloo ranks; groups that end too soon.

``test_training`` has the plain wrappers. Here ranks of one model hold parameters on other meshes, or other layers, so a
step that waits for everybody would hang. ``python -m tests.sharding.matrix --ranks 4`` runs the same on four.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.sharding import lost_groups
from tests.sharding.parallel import bar, cases, complaint
from tests.sharding.workers import run

pytestmark = [
    pytest.mark.timeout(900),  # the first test waits for all ranks
    pytest.mark.xdist_group("parallel styles"),
]


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    return run(2, cases(2))


@pytest.mark.parametrize("name", cases(2))
def test_ten_steps_equal_one_process(answers: Any, name: str) -> None:
    assert complaint(name, answers[name]) == ""


def test_a_wrong_answer_would_be_found(answers: Any) -> None:
    """Rounding to bf16 is far above what is allowed; so the comparison of mixed precision says something."""
    name = "mixed-float64"
    assert all(answer["rounding"] > 1e6 * bar(name) for answer in answers[name])
    assert "differs by" in complaint(name, [answer | {"difference": answer["rounding"]} for answer in answers[name]])
    assert "Error" in complaint(name, ["Error: of a rank"])


def test_stages_send_nothing_where_they_are_whole(answers: Any) -> None:
    assert [answer["messages"] for answer in answers["pipeline-float64"]] == [[], []]
    assert [answer["layers"] for answer in answers["pipeline-float64"]] == [["0"], ["1"]]


def test_experts_are_on_a_mesh_of_their_own(answers: Any) -> None:
    for answer in answers["experts-float64"]:
        assert answer["meshes"] == {("pairs", "experts")}
        assert {ranks for ranks, _ in answer["messages"]} == {2}  # what the other parameters share


def test_a_rank_that_dies_ends_the_others_steps() -> None:
    *others, last = lost_groups.run("dies", 3)
    assert last == ""
    assert all(said.startswith("unmoved ") and "stepped" not in said.split()[:2] for said in others), others


@pytest.mark.parametrize("scene", ["group_gone", "all_gone", "gone_before", "flat_gone_before"])
def test_a_destroyed_group_is_named(scene: str) -> None:
    for said in lost_groups.run(scene, 2):
        assert said.startswith("unmoved RuntimeError: the process group "), said
        assert "was destroyed; nothing has been stepped. Shard the model and build the optimizer anew" in said


def test_a_mesh_dimension_that_does_not_exist_is_torchs_to_refuse() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        with pytest.raises(KeyError, match="tp"):
            mesh["tp"]
    finally:
        dist.destroy_process_group()
