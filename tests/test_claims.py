"""The table of claims in docs/reproduction.md: numbers and verdicts are those of committed results, and commands exist.

``tests/claims.py`` computes what each row must say. A number of ours that nothing there accounts for fails the test.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from experiments.grids import STUDIES
from tests.claims import EXPECTED
from tests.documents import ROOT

PAGE = ROOT / "docs" / "reproduction.md"
HEADINGS = ["claim", "the paper", "ours", "verdict", "command"]
VERDICTS = ("confirmed", "refuted", "in part", "undecided", "not testable here", "not measured yet", "not measured")
WITHOUT_RUNS = VERDICTS[4:]
LONGEST = 125
"""Characters of a cell: five lines on a phone."""


@dataclass(frozen=True)
class Row:
    """A row of the table, as Markdown."""

    claim: str
    paper: str
    ours: str
    verdict: str
    command: str


def rows() -> list[Row]:
    """The rows of the table of claims."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index("| claim |") :].split("\n\n")[0].splitlines()
    heading, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert heading == HEADINGS
    return [Row(*cells) for cells in body]


ROWS = rows()


def plain(cell: str) -> str:
    """A cell without its links' targets."""
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", cell)


def unaccounted(text: str, numbers: Sequence[str]) -> list[str]:
    """What is wrong: numbers that the text lacks, in their order, and digits left when all of them are taken out."""
    place, wrong = 0, []
    left = []
    for number in numbers:
        found = re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text[place:])
        if found is None:
            wrong.append(f"{number} is not in {text[place:]!r}")
            continue
        left.append(text[place : place + found.start()])
        place += found.end()
    left.append(text[place:])
    return wrong + [
        f"{digits} is no number of the results" for part in left for digits in re.findall(r"[-+]?\d[\d.,]*", part)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: plain(row.claim)[:40])
def test_numbers_and_verdicts_are_those_of_the_results(row: Row) -> None:
    found = [make for beginning, make in EXPECTED.items() if plain(row.claim).startswith(beginning)]
    if row.ours == "–":
        assert found == [] and row.verdict.startswith(WITHOUT_RUNS)
        assert not re.search(r"\d", row.verdict)
        return
    assert len(found) == 1, "no function in tests/claims.py says what this row must be"
    verdict, numbers = found[0]()
    assert row.verdict.startswith(verdict), verdict
    assert unaccounted(f"{row.ours} | {row.verdict}", numbers) == []


def test_every_expectation_has_its_row() -> None:
    claims = [plain(row.claim) for row in ROWS]
    for beginning in EXPECTED:
        assert sum(claim.startswith(beginning) for claim in claims) == 1, beginning
    assert len(set(claims)) == len(claims) > 30


def test_verdicts_are_of_the_list_and_cells_are_short() -> None:
    for row in ROWS:
        assert row.verdict.startswith(VERDICTS), row.verdict
        for cell in (row.claim, row.paper, row.ours, row.verdict, row.command):
            assert 0 < len(plain(cell)) <= LONGEST, cell


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for row in ROWS:
        commands = re.findall(r"`([^`]+)`", row.command)
        assert commands or row.command == "–"
        for command in commands:
            make = re.fullmatch(r"make (\S+)(?: [A-Z]+=\S+)*", command)
            module = re.match(r"python -m ([\w.]+)", command)
            assert make or module, command
            assert make is None or make[1] in targets, command
            assert module is None or importlib.util.find_spec(module[1]) is not None, command
            for study in re.findall(r"--study (\S+)", command):
                assert study in STUDIES, command


def test_links_lead_to_a_page_and_a_heading() -> None:
    assert sum("](" in row.claim for row in ROWS) > 25
    for target, _, anchor in (
        link.partition("#") for row in ROWS for link in re.findall(r"\]\(([^)]+)\)", " ".join(vars(row).values()))
    ):
        page = (PAGE.parent / target).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", page, re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_a_wrong_number_is_seen() -> None:
    assert unaccounted("+0.0336 ± 0.0116, n = 3", ["+0.0336 ± 0.0116", "n = 3"]) == []
    assert unaccounted("+0.0337 ± 0.0116, n = 3", ["+0.0336 ± 0.0116", "n = 3"])
    assert unaccounted("+0.0336 ± 0.0116, n = 3; 7 more", ["+0.0336 ± 0.0116", "n = 3"])
    assert unaccounted("10.25", ["10.2"]) and unaccounted("n = 38", ["n = 3"])
