"""The ``record`` fixture: a check leaves rows for the matrix of docs/integrations.md."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from tests.interop.records import Row, prune, store, versions

Record = Callable[..., None]
_OUTCOME = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_OUTCOME] = report
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """Whole files are about to run: rows of checks that they no longer have would stay for ever."""
    picked = session.config.option.keyword or any("::" in argument for argument in session.config.args)
    if not picked and not session.config.option.collectonly:
        prune({item.nodeid for item in session.items if "/check_" in item.nodeid})


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """``record(door, case, libraries, ranks=1, ran=..., result=...)``; a check may call it several times.

    Libraries are asked for their versions here; those of another environment come as a text that says them.
    """
    rows: list[Row] = []

    def leave(door: str, case: str, libraries: list[str] | str, *, ran: str, result: str, ranks: int = 1) -> None:
        on = "1 process" if ranks == 1 else f"{ranks} ranks, gloo"
        said = libraries if isinstance(libraries, str) else versions(*libraries)
        rows.append(Row(door, case, said, on, ran, result))

    yield leave
    report: Any = request.node.stash.get(_OUTCOME, None)
    if report is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        failed = "" if report.passed else (crash.message.splitlines()[0][:200] if crash else "no answer")
        store(request.node.nodeid, rows, failed)
