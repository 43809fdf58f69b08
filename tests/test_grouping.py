"""Tests of one group run in one worker, and slow tests run first.

Without groups every worker would start the gloo ranks of every world size.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.grouping import SLOW, pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import os, pathlib, pytest, time

@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("group", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("a", "b")])
def test_grouped(group, number):
    time.sleep(0.02)
    pathlib.Path(__file__).with_name(f"{group}{number}").write_text(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_every_group_has_one_worker_and_both_work(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.grouping import pytest_collection_modifyitems\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = {group: {path.read_text() for path in tmp_path.glob(f"{group}?")} for group in "ab"}
    assert workers["a"] | workers["b"] == {"gw0", "gw1"} and all(len(own) == 1 for own in workers.values())


def test_slow_tests_come_first_in_their_order() -> None:
    names = ["tests/analysis/test_stats.py::a", f"{SLOW[1]}::c", f"{SLOW[1]}::b", "tests/test_wheel.py::d"]
    items = [SimpleNamespace(nodeid=name) for name in names]
    pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[1], names[2], names[0], names[3]]


def test_no_slow_file_is_stale() -> None:
    assert [path for path in SLOW if not (ROOT / path).exists()] == []
