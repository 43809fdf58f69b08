"""Ranks that train sharded models: the processes of a world size are started once, for all tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.suite import TRAINED, identity, others
from tests.sharding.workers import run


class _Results(dict[int, dict[str, list[Any]]]):
    """World size -> case -> the ranks' answers: the processes of a world size are started once, for all cases.

    Two ranks are interpreters with different hash seeds. Three ranks are forked, because every further interpreter
    takes four seconds of imports.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, world: int) -> dict[str, list[Any]]:
        cases = {identity(c): ("train_case", c.arguments()) for c in TRAINED[world]} | others(world, self.folder)
        self[world] = run(world, cases, own_interpreters=world == 2)
        return self[world]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> _Results:
    return _Results(str(tmp_path_factory.mktemp("checkpoints")))
