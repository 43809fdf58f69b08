"""Samples of enwik8 are prepared by whoever needs them first, once, and are the pinned tokens; the two workloads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.configs import TrainConfig, of_workloads
from experiments.data import prepare as command
from experiments.data import samples
from experiments.data.prepared import folder_of, is_prepared
from experiments.data.samples import SAMPLES, Sample, prepare_sample
from experiments.data.sources import Document
from experiments.data.tokenisers import Tokeniser
from experiments.recipes import RECIPES
from experiments.train import fetch

NAME = "enwik8-letters-small"


def letters(name: str) -> Tokeniser:
    return Tokeniser(name, 300, 256, "0" * 64, lambda texts: [list(text.encode()) for text in texts])


def pages(source: str, skip: int = 0) -> Iterator[Document]:
    for i in range(skip, 100):
        yield Document(f"page {i} of {source}", validation=i < 10)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sample of documents and a tokeniser of this file."""
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(command, "BATCH", 8)
    monkeypatch.setattr(command.prepare, "__defaults__", (0, pages))
    monkeypatch.setattr(samples, "load_tokeniser", letters)
    monkeypatch.setitem(SAMPLES, NAME, Sample("letters", 300, fingerprint_of_the_pages()))
    return tmp_path


def fingerprint_of_the_pages() -> str:
    if not is_prepared("other"):
        command.prepare("other", "enwik8", letters("letters"), 300)
    return data.load("other").fingerprint


def config() -> TrainConfig:
    return dataclasses.replace(of_workloads()["llama-smoke"], data=NAME)


def test_a_run_prepares_its_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(config())
    corpus = data.load(NAME)
    assert 300 <= len(corpus.train) < 500 and len(corpus.validation) > 100  # 100 pages would be 1,800 tokens
    monkeypatch.setattr(samples, "load_tokeniser", lambda name: pytest.fail("it is prepared"))
    fetch(config())


def test_callers_at_the_same_time_wait_for_the_one_that_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slowly(source: str, skip: int = 0) -> Iterator[Document]:
        calls.append(source)
        time.sleep(0.2)
        return pages(source, skip)

    monkeypatch.setattr(command.prepare, "__defaults__", (0, slowly))
    with ThreadPoolExecutor(3) as pool:  # a lock of a file that each caller opens holds between threads, too
        list(pool.map(prepare_sample, [NAME] * 3))
    assert calls == ["enwik8"] and is_prepared(NAME)


def test_other_tokens_than_the_pinned_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_sample(NAME)
    file = folder_of(NAME) / "meta.json"
    file.write_text(file.read_text().replace(SAMPLES[NAME].fingerprint, "0" * 64))
    with pytest.raises(RuntimeError, match=f"{NAME} has the fingerprint 0000.* is pinned; delete it"):
        fetch(config())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Tokeniser:
        raise RuntimeError(f"tokenizer={name!r} needs the library tokenizers")

    monkeypatch.setattr(samples, "load_tokeniser", missing)
    with pytest.raises(RuntimeError, match="tokenizer='letters' needs the library"):
        fetch(config())
    assert not is_prepared(NAME)


@pytest.mark.parametrize(("name", "recipe"), [("gpt2", "gpt2-125m"), ("llama", "llama-39m")])
def test_workloads_are_small_forms_of_the_recipes(name: str, recipe: str) -> None:
    small, full = of_workloads()[name], RECIPES[recipe]()
    assert type(small.model) is type(full.model) and small.data in SAMPLES
    assert SAMPLES[small.data].tokeniser == full.data.partition("-")[2]
    same = ("vocab", "tied", "bias", "init", "rope_base")
    assert all(getattr(small.model, key, 0) == getattr(full.model, key, 0) for key in same)
    same = ("decay", "lr_end", "clip", "weight_decay", "beta1", "beta2")
    assert all(np.isclose(getattr(small, key), getattr(full, key)) for key in same if key != "decay")
    assert small.decay == full.decay
