"""The simulator of what optimizers send, against collectives counted on gloo ranks, and the page made from it.

``tests.sharding`` shows that blocks are cut where the geometries say; these tests, that the simulator cuts as torch
does.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.check import Checked, cases, difference, expected
from benchmarks.scaling.document import BEGIN, END, compute, merged, tables
from benchmarks.scaling.simulate import fsdp2, zero3
from benchmarks.scaling.weights import weights_of
from optimizer.tools.targets import load_target
from tests.sharding.models import MODELS
from tests.sharding.workers import run

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("counted collectives"),  # the ranks are started once
]
CASES = [(ranks, case) for ranks in (2, 3) for case in cases(ranks)]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, Checked], list[Any]]:
    """What each rank's second step sent."""
    out = {}
    for ranks in (2, 3):
        chosen = {"-".join(case): case for case in cases(ranks)}
        answers = run(ranks, {n: ("benchmarks.scaling.check:counted", c._asdict()) for n, c in chosen.items()})
        out |= {(ranks, chosen[name]): answer for name, answer in answers.items()}
    return out


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=[f"{ranks}-{'-'.join(case)}" for ranks, case in CASES])
def test_counted_collectives_are_the_simulated_ones(counted: Any, ranks: int, case: Checked) -> None:
    assert difference(case, ranks, counted[ranks, case]) == ""


def test_a_number_too_many_would_be_found(counted: Any) -> None:
    case = Checked("llama", "fsdp2")
    answers = [[(size, nbytes + 4) for size, nbytes in own] for own in counted[3, case]]
    assert "rank 0 counted" in difference(case, 3, answers)
    assert "(3 ranks differ)" in difference(case, 3, [[]] * 3)


@pytest.mark.parametrize(("dp", "tp"), [(3, 1), (1, 6), (2, 3), (4, 2), (16, 3)])
def test_the_first_rank_sends_the_most(dp: int, tp: int) -> None:
    """What the tables show is that rank's; and within a group all send the same."""
    weights = weights_of(MODELS["llama-parallel"]())
    sent = {at: {m.along: m.numbers for m in fsdp2(weights, dp, tp, at)}
            for at in itertools.product(range(dp), range(tp))}  # fmt: skip
    for (d, t), own in sent.items():
        assert own.get("dp") == sent[0, t].get("dp")
        assert own.get("tp") == sent[d, 0].get("tp")
        assert all(own[along] <= sent[0, 0][along] for along in own)


def test_what_nobody_cuts_is_not_sent() -> None:
    elementwise = weights_of(MODELS["llama"](), "elementwise")
    assert fsdp2(elementwise, 5) == [] and fsdp2(elementwise, 1, 3) == []


def test_sub_groups_send_one_message_each() -> None:
    weights = weights_of(MODELS["llama"]())
    several, one = zero3(weights, 5, sub_group=400), zero3(weights, 5)
    assert len(several) > len(one) == 2
    blocks = [sum(message.blocks.total() for message in messages) for messages in (several, one)]
    assert blocks[0] == blocks[1]


def test_the_page_says_what_the_simulator_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = compute(("llama-3-8b",), (8, 4096))
    rows = tables(found, {"adam_mini": found["llama-3-8b"]["rows"][:4]}).splitlines()
    wanted = [row for row in rows if row.startswith(("| 8 | ", "| 4,096 | "))][:2]
    assert len(wanted) == 2 and all(row in page for row in wanted)


def test_four_hundred_billion_on_four_thousand_ranks_is_counted_by_hand() -> None:
    """Every one of 128 query and 8 key heads of 126 layers, and 253 norms, are cut; each tensor sends one more."""
    (message,) = fsdp2(weights_of(load_target("llama-3-405b")), 4096)
    assert dict(message.blocks) == {"QUERY": 126 * 128, "KEY": 126 * 8, "NORM": 2 * 126 + 1}
    assert message.tensors == 126 * 2 + 253


def test_tables_replace_what_stood_between_the_marks() -> None:
    assert merged(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    with pytest.raises(ValueError, match="put the two lines where the tables belong"):
        merged("no marks", "new")


def test_every_rank_of_a_case_is_expected() -> None:
    for ranks in (4, 5, 6, 7):
        assert all(len(expected(case, ranks)) == ranks for case in cases(ranks))
