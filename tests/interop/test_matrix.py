"""The bookkeeping of ``make interop``: rows are replaced by check, failures stay visible, the page keeps its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.matrix import END, START, alive, written
from tests.interop.records import Row, load, prune, store

ROW = Row("DDP", "as it stands", "torch 2.13.0", "2 ranks, gloo", "ddp.py", "equal")
HERE = "tests/interop/test_matrix.py"


def test_a_check_run_alone_replaces_its_own_rows_only(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    store("b", [ROW], file=file)
    store("a", [ROW, ROW], file=file)
    store("b", [Row("FSDP2", *list(vars(ROW).values())[1:])], file=file)
    found = load(file)
    assert list(found) == ["a", "b"] and len(found["a"]) == 2 and found["b"][0].door == "FSDP2"
    store("a", [], file=file)
    assert list(load(file)) == ["b"] and list(tmp_path.iterdir()) == [file]


def test_a_failure_takes_the_place_of_the_result(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    store("a", [ROW], file=file)
    store("a", [], "assert 2 == 1", file)
    assert load(file)["a"][0].result == "FAILED: assert 2 == 1" and load(file)["a"][0].door == "DDP"
    store("never ran before", [], "no answer", file)
    assert load(file)["never ran before"][0].result == "FAILED: no answer"


def test_a_whole_file_drops_what_it_no_longer_has(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for check in ("a.py::check", "a.py::check[2]", "b.py::check"):
        store(check, [ROW], file=file)
    prune({"a.py::check[2]", "a.py::check[3]"}, file)
    assert list(load(file)) == ["a.py::check[2]", "b.py::check"]
    prune(set(), file)
    assert len(load(file)) == 2


def test_rows_of_checks_that_are_gone_are_left_out() -> None:
    here = f"{HERE}::test_rows_of_checks_that_are_gone_are_left_out[2]"
    assert alive({here: [ROW], f"{HERE}::check_gone": [ROW], "tests/interop/gone.py::check": [ROW]}) == [ROW]


def test_only_the_table_is_rewritten() -> None:
    page = written(f"before\n{START}\nold\n{END}\nafter\n", [ROW])
    assert page.startswith(f"before\n{START}\n| integration |") and page.endswith(f"{END}\nafter\n")
    assert "| DDP | as it stands |" in page and "old" not in page
    with pytest.raises(ValueError, match="once each"):
        written("no marks", [ROW])
