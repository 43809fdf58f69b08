from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.sharding.suite import TRAINED, identity, others
from tests.sharding.workers import run


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, dict[str, list[Any]]]:
    """World size -> case -> the ranks' answers: the processes of a world size are started once for all cases."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return {
        world: run(
            world,
            {
                identity(case): (
                    "train_case",
                    {"name": case.model, "wrap": case.wrap, "kind": case.kind, "dtype": case.dtype},
                )
                for case in cases
            }
            | others(world, folder),
        )
        for world, cases in TRAINED.items()
    }
