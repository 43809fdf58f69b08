"""A run of a second, one thread: bits do not depend on the machine's number of cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from experiments.configs import TrainConfig, smoke


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config() -> TrainConfig:
    return dataclasses.replace(smoke(), experiment="test", eval_every=5, checkpoint_every=5)
