"""Pre-training on real tokens: runs of one process and of two by torchrun, DDP for GPT-2 and FSDP2 for Llama, agree."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.configs import of_workloads
from experiments.data.samples import SAMPLES
from experiments.data.tokenisers import load_tokeniser
from experiments.train import fetch, run_folder, train
from tests.experiments.processes import ROOT


@pytest.mark.parametrize(("name", "parallel"), [("gpt2", "ddp"), ("llama", "fsdp2")])
def check_two_processes_train_as_one(tmp_path: Path, name: str, parallel: str) -> None:
    config = dataclasses.replace(of_workloads()[f"{name}-smoke"], lr=0.1)
    fetch(config)
    alone = train(config, tmp_path / "alone")
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.train"]
    subprocess.run(
        [sys.executable, *processes, f"{name}-smoke", "--lr=0.1", f"--parallel={parallel}", "--threads=1",
         f"--results={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )  # fmt: skip
    folder = run_folder(tmp_path / "two", config.with_rules_hash())
    two = json.loads((folder / "status.json").read_text())
    assert json.loads((folder / "environment.json").read_text())["parallel"] == parallel
    assert two["final_val_loss"] == pytest.approx(alone["final_val_loss"], abs=1e-3)
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert two["final_val_loss"] < first["val_loss"] - 0.05  # further from the start than the two are apart


@pytest.mark.parametrize("name", list(SAMPLES))
def check_samples_are_text_of_their_tokeniser(name: str) -> None:
    fetch(dataclasses.replace(of_workloads()["llama" if "mistral" in name else "gpt2"], data=name))
    corpus, tokeniser = data.load(name), load_tokeniser(SAMPLES[name].tokeniser)
    assert tokeniser.vocab == corpus.vocab and tokeniser.dtype == corpus.train.dtype
    words = np.array(tokeniser.encode(["the history of the"])[0][-3:], corpus.train.dtype)
    assert words.tobytes() in corpus.train.tobytes()
    assert 3e6 < len(corpus.train) < 4e6 and int(corpus.train.max()) < corpus.vocab
    assert (corpus.train == tokeniser.end).sum() > 400  # one after each page
