"""``@pytest.mark.xdist_group(name)``: tests of one group run in one worker, so that what they share is made once."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Make the marks take effect under pytest 9.2.

    pytest-xdist 3.8 appends a test's group to ``_nodeid``. pytest 9.2 reads a test's identity from ``_id``, so the
    groups would be ignored without a word. Remove this when pytest-xdist no longer needs it; ``test_grouping`` tells.
    """
    for item in items:
        with_group = getattr(item, "_nodeid", item.nodeid)
        if with_group != item.nodeid:
            item._id = type(item._id).parse(with_group)
