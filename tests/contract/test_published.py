"""The negative control: the published adam-mini 1.1.1 under the same checks, and which of them it holds."""

from __future__ import annotations

import warnings

import pytest

from tests.contract import checks
from tests.contract.harness import CHECKS, ours
from tests.contract.subjects import published

assert checks.__all__
HELD: frozenset[str] = frozenset()


def test_what_the_published_package_holds(capsys: pytest.CaptureFixture[str]) -> None:
    subject, held = published(), set()
    applicable = [check for check in CHECKS.values() if check.applies is not ours and check.applies(subject)]
    for check in applicable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check.run(subject)
            except (Exception, pytest.fail.Exception):
                continue
        held.add(check.name)
    assert held == HELD
