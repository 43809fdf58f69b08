"""A process group that stands in for many ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def two_processes() -> Iterator[None]:
    """A process group that says it has two members and reduces nothing."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()
