"""A run of a second, one thread: bits do not depend on the machine's number of cores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiments.configs import TrainConfig, smoke


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> TrainConfig:
    return dataclasses.replace(smoke(), experiment="test", eval_every=5, checkpoint_every=5)
