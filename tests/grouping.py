"""Which worker runs a test, and when.

``@pytest.mark.xdist_group(name)``: tests of one group run in one worker, so that what they share is made once.
pytest-xdist starts the groups first, the largest before the others, and then single tests in the order of collection.
"""

from __future__ import annotations

from typing import Any

import pytest

SLOW = (
    "tests/experiments/",
    "tests/optimizer/test_triton.py",
    "tests/sharding/test_one_rank.py",
    "tests/test_docs.py",
    "tests/test_grouping.py",
)
"""Files and folders whose single tests take seconds, because they start processes or compile.

They run before other single tests. At the end of a run one worker waits for the other, and only for a short test then.
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Move slow tests to the front, and make the marks take effect under pytest 9.2.

    pytest-xdist 3.8 appends a test's group to ``_nodeid``. pytest 9.2 reads a test's identity from ``_id``, so the
    groups would be ignored without a word. Remove this when pytest-xdist no longer needs it; ``test_grouping`` tells.
    """
    for item in items:
        with_group = getattr(item, "_nodeid", item.nodeid)
        if with_group != item.nodeid:
            item._id = type(item._id).parse(with_group)
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))
