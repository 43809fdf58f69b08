"""Products are not traced here unless a test asks for it: tracing pays for thousands of columns, not for hundreds."""

from __future__ import annotations

import pytest

import hessian.operators


@pytest.fixture(autouse=True)
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.operators, "LINEARISE_AFTER", 10**9)
