"""TRL's RLOO trainer on a small policy with a stand-in for the reward model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.configs import TrainConfig
from experiments.grids import grid
from experiments.train import run_folder, train
from experiments.workloads import remax, rloo
from experiments.workloads.rloo import LeaveOneOut, LeavingOut

from .check_remax import letters


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and no reward model."""
    torch.set_num_threads(1)
    monkeypatch.setattr(rloo, "trained_score", lambda: (letters, "0" * 16))


@pytest.fixture
def config() -> TrainConfig:
    """A smoke run of RLOO."""
    return next(c for c in grid("smoke", ("adam_mini",), "rloo"))


def check_a_smoke_run_finishes_and_learns(config: TrainConfig, tmp_path: Path) -> None:
    ending = train(config, tmp_path)
    assert ending["state"] == "finished"
    lines = (run_folder(tmp_path, config.with_rules_hash()) / "metrics.jsonl").read_text().splitlines()
    assert {"val_loss", "reward", "gain", "kl", "length"} <= json.loads(lines[-1]).keys()
    assert json.loads(lines[-1])["kl"] > 0  # the weights have moved, and the reference has not


def check_a_run_that_is_killed_resumes_to_the_same_weights(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config, tmp_path / "whole")
    plain, calls = LeavingOut.judged, []

    def killed(self: LeavingOut, completions: Any, **more: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, completions, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LeavingOut, "judged", killed)
        train(config, tmp_path / "cut")
    again = train(config, tmp_path / "cut")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["final_val_loss"] == whole["final_val_loss"]


def check_what_has_gone_wrong_is_named(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rloo, "trained_score", lambda: (lambda said: torch.zeros(len(said)), "1" * 16))
        ending = train(config, tmp_path / "constant")
    assert ending["state"] == "diverged" and "so nothing can be learnt" in ending["reason"]
    hot = dataclasses.replace(
        config, model=dataclasses.replace(config.model, kl_limit=1e-3), lr=0.03, checkpoint_every=1
    )
    ending = train(hot, tmp_path / "hot")
    assert ending["state"] == "diverged" and "over kl_limit=0.001" in ending["reason"]
    assert list((run_folder(tmp_path / "hot", hot.with_rules_hash()) / "checkpoints").glob("checkpoint-*"))


def check_fields_that_do_not_fit_are_refused() -> None:
    for kind, words in (
        (LeaveOneOut(rollouts=1), "must be at least 2"),
        (LeaveOneOut(one_step=True), "one_step=True is for ReMax"),
    ):
        with pytest.raises(ValueError, match=words):
            kind.require_consistent()
    assert remax.ReMax(rollouts=1).require_consistent() is None  # type: ignore[func-returns-value]
