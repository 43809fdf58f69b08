"""One thread: bits do not depend on the machine's number of cores."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    torch.set_num_threads(1)
