"""Products are not traced here unless a test asks for it: tracing pays for thousands of columns, not for hundreds."""

from __future__ import annotations

import pytest
import torch

import hessian.operators


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """These matrices are tiny: two threads would wait for one another at every operation."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian.operators, "LINEARISE_AFTER", 10**9)
