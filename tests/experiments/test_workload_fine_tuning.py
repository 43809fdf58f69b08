"""Instructions, ratings, and what fine-tuning and reward models compute, without the libraries that train."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.configs import TrainConfig
from experiments.data import instructions, ratings, registry
from experiments.data.ratings import Snippet, pairs
from experiments.data.splits import held_out_tenth
from experiments.grids import STUDIES
from experiments.parallel import Team
from experiments.train import DEFAULTS, learning_rate
from experiments.workloads import WORKLOADS, FineTuning, RewardModel, reward, trl_loop
from experiments.workloads.sft import IGNORED, LEAST_ANSWER, held_out_loss, padded, tokenised

NAMES = ("sft", "sft_lora", "reward")

# ------------------------------------------------------------------------------------------------------------ data


def test_a_tenth_is_held_out_and_the_same_every_time() -> None:
    train, held_out = held_out_tenth(range(105))
    assert len(held_out) == 10 and sorted([*train, *held_out]) == list(range(105))
    assert (train, held_out) == held_out_tenth(range(105)) and held_out != held_out_tenth(range(105), stream=1)[1]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "ultrafeedback").mkdir(parents=True, exist_ok=True)
    (folder / "ultrafeedback" / "instructions.json").write_text(json.dumps(rows))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path / "cache"))
    for cached in (instructions.instructions, ratings.comparisons, ratings.snippets):
        cached.cache_clear()
    return tmp_path / "cache"


def test_a_question_is_kept_once_and_rows_without_an_answer_are_left_out(cache: Path) -> None:
    rows = [{"instruction": f"Count to {i // 2}", "input": "", "output": str(i)} for i in range(40)]
    write_rows(cache, [*rows, {"instruction": "Say nothing", "input": "at all", "output": " "}])
    train, held_out = instructions.instructions("ultrafeedback")
    assert (len(train), len(held_out)) == (18, 2)
    assert {row.question: row.answer for row in (*train, *held_out)} == {f"Count to {i}": str(2 * i) for i in range(20)}


def test_data_that_cannot_be_had_is_refused(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"needs .*instructions\.json; write it"):
        instructions.instructions("ultrafeedback")
    with pytest.raises(FileNotFoundError, match=r"needs .*pairs\.json; write it"):
        ratings.comparisons("ultrafeedback")
    write_rows(cache, [{"instruction": "Count", "input": "", "output": "1"}] * 20)
    with pytest.raises(ValueError, match="has 1 rows with an answer"):
        instructions.instructions("ultrafeedback")
    with pytest.raises(ValueError, match="data='c4' is no set of instructions; use 'alpaca-en-demo'"):
        instructions.instructions("c4")
    with pytest.raises(ValueError, match="data='c4' is no set of ratings; use 'vader-ratings'"):
        ratings.comparisons("c4")


def test_too_few_pairs_are_refused(cache: Path) -> None:
    write_rows(cache, [])
    (cache / "ultrafeedback" / "pairs.json").write_text(json.dumps([{"better": "a", "worse": "b", "request": "c"}]))
    with pytest.raises(ValueError, match="1 training and 0 held-out pairs"):
        ratings.comparisons("ultrafeedback")


def test_sentences_that_are_equal_but_for_case_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for source in ratings.SOURCES:
            lines = [f"{i}\t{i / 100}\t{word}" for i in range(100) for word in (f"Word {i}.", f"WORD {i}.")]
            name = tarfile.TarInfo(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            content = "\n".join(lines).encode()
            name.size = len(content)
            tar.addfile(name, io.BytesIO(content))
    monkeypatch.setattr(ratings, "member", lambda *_, **__: written.getvalue())
    train, held_out = ratings.snippets()
    assert sorted(row.text for row in (*train, *held_out)) == sorted(f"Word {i}." for i in range(100))
    assert {row.source for row in (*train, *held_out)} == {ratings.SOURCES[0]}


def test_pairs_are_of_one_source_and_differ_enough_and_no_sentence_is_used_twice() -> None:
    rows = [Snippet(source, f"{source} {i}", i / 20) for source in ratings.SOURCES for i in range(100)]
    found = pairs(rows)
    assert len(found) > 80 and found == pairs(rows)
    assert all(a.source == b.source and a.rating - b.rating >= 1.0 for a, b in found)
    used = [snippet.text for pair in found for snippet in pair]
    assert len(used) == len(set(used))
    assert len({a.source for a, _ in found[:20]}) > 1  # not one source after another


def sdist(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_file_of_an_sdist_is_kept_and_checked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, downloads = sdist({"a-1/data/rows.json": b"[1]", "a-1/other/rows.json": b"[2]"}), []

    @contextmanager
    def downloaded(package: str, suffix: str, folder: Path, **_: str) -> Iterator[Path]:
        downloads.append(package)
        (folder / f"a{suffix}").write_bytes(whole)
        yield folder / f"a{suffix}"

    monkeypatch.setattr(registry, "downloaded", downloaded)
    args = ("a==1", hashlib.sha256(whole).hexdigest(), "data/rows.json", hashlib.sha256(b"[1]").hexdigest())
    assert registry.member(*args, needed_by="x") == b"[1]" == registry.member(*args, needed_by="x")
    assert downloads == ["a==1"]
    next(cache.rglob("rows.json")).write_bytes(b"[3]")
    with pytest.raises(RuntimeError, match=r"rows\.json has sha256 .* is pinned; delete it"):
        registry.member(*args, needed_by="x")
    with pytest.raises(RuntimeError, match="is pinned"):
        registry.member("b==1", "0" * 64, *args[2:], needed_by="x")


# ---------------------------------------------------------------------------------------------------------- tokens


class Letters:
    """A tokenizer whose tokens are letters: a question ends with "?", an answer with "." and the padding token 0."""

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> list[int]:
        ends = {"user": "?", "assistant": ".", "system": "!"}
        return [ord(letter) for turn in chat for letter in turn["content"] + ends[turn["role"]]]


def test_labels_are_the_answers_tokens_and_long_rows_are_cut_or_left_out() -> None:
    rows = [instructions.Instruction("a" * n, "b" * m) for n, m in ((3, 2), (3, 90), (30, 90))]
    short, cut = tokenised(rows, Letters(), 40)
    assert short["labels"] == [IGNORED] * 4 + [ord("b")] * 2 + [ord(".")]
    assert short["input_ids"] == [*map(ord, "aaa?bb.")]
    assert len(cut["input_ids"]) == len(cut["labels"]) == 40 and cut["labels"].count(IGNORED) == 4
    with pytest.raises(ValueError, match=f"seq_len={LEAST_ANSWER} leaves no row of 3"):
        tokenised(rows, Letters(), LEAST_ANSWER)


def test_pairs_that_are_too_long_are_left_out() -> None:
    told = [ratings.Comparison("good", "bad", "?"), ratings.Comparison("good" * 9, "bad", "?")]
    rows = reward.tokenised(told, Letters(), 20)
    assert rows == [{"chosen_ids": [*map(ord, "!??good.")], "rejected_ids": [*map(ord, "!??bad.")]}]
    with pytest.raises(ValueError, match="seq_len=3 leaves none of 2 pairs"):
        reward.tokenised(told, Letters(), 3)


# --------------------------------------------------------------------------------------------------------- numbers


class Bigrams(torch.nn.Module):
    """A model whose logits depend on the last token alone: the logarithms of the rows of a table."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(table).log())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.logits[input_ids]})


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_held_out_loss_is_the_mean_over_the_answers_tokens(rows: int) -> None:
    held_out = [
        {"input_ids": [0, 1, 2], "labels": [IGNORED, 1, 2]},
        {"input_ids": [0, 1, 1, 2, 2, 2], "labels": [IGNORED, IGNORED, IGNORED, 2, 2, 2]},
        {"input_ids": [0, 1], "labels": [IGNORED, 1]},
    ]
    table = [[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.1, 0.3, 0.6]]
    wanted = -torch.tensor([0.3, 0.4, 0.4, 0.6, 0.6, 0.3]).log().mean().item()
    assert held_out_loss(Bigrams(table), held_out, rows, casting=torch.no_grad) == pytest.approx(wanted, rel=1e-6)


def test_padding_is_on_the_right() -> None:
    assert padded([[1], [2, 3]], 9).tolist() == [[1, 9], [2, 3]]


def test_accuracy_and_calibration_are_those_of_the_margins() -> None:
    assert reward.accuracy(torch.tensor([1.0, -2.0, 0.0, 3.0])) == 0.625
    sure = torch.tensor(0.8).logit().item()
    error, bins = reward.calibration(torch.tensor([sure] * 8 + [-sure] * 2))  # 80 % sure and right in 80 %
    assert error == pytest.approx(0.0, abs=1e-6) and bins == [{"pairs": 10.0, "confidence": 0.8, "accuracy": 0.8}]
    error, _ = reward.calibration(torch.tensor([sure] * 4 + [-sure] * 6))
    assert error == pytest.approx(0.4, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_read_as_they_were_written(name: str) -> None:
    workload = WORKLOADS[name]
    for fields in ({}, *workload.full.values()):
        config = TrainConfig(name, **{**workload.run, **fields})
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = STUDIES[name].small()
    assert small.model.width == 64 and small.steps <= 4


def test_the_full_size_is_the_papers() -> None:
    full = {name: TrainConfig(name, **{**WORKLOADS[name].run, **WORKLOADS[name].full["llama-2-7b"]}) for name in NAMES}
    assert [full[name].lr for name in NAMES] == [2e-6, 2e-6, 2e-5]
    assert full["sft_lora"].model.lora_rank == 128 and full["sft_lora"].steps == 917
    assert {round(config.warmup * config.steps) for config in full.values()} == {10}


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (FineTuning, {"base": "gpt2"}, "base='gpt2' is unknown"),
        (FineTuning, {"width": 40}, "width=40 must be a multiple of 32"),
        (FineTuning, {"lora_rank": -1}, "lora_rank=-1 must be a whole number"),
        (FineTuning, {"lora_alpha": 0}, "lora_alpha=0 must be a whole number"),
        (RewardModel, {"base": "gpt2"}, "base='gpt2' is unknown"),
        (RewardModel, {"width": -32}, "width=-32 must be"),
    ],
)
def test_fields_that_are_wrong_are_refused(kind: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig("x", kind(**fields))


# ------------------------------------------------------------------------------------------------------------ loop

IDENTITY = {"config": "c", "data": "d"}


def checkpoint(folder: Path, step: int, **changes: Any) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"12345")
    manifest = {**IDENTITY, "files": {"weights": 5}, "progress": {"step": step}, **changes}
    (path / trl_loop.MANIFEST).write_text(json.dumps(manifest))
    return path


def test_the_newest_complete_checkpoint_is_used(tmp_path: Path) -> None:
    assert trl_loop.newest(tmp_path, IDENTITY) == (None, {})
    old = checkpoint(tmp_path, 9)
    torn, cut, unfinished = (checkpoint(tmp_path, step) for step in (10, 11, 12))
    (torn / "weights").write_bytes(b"123")
    (cut / trl_loop.MANIFEST).write_text('{"config": ')
    (unfinished / trl_loop.MANIFEST).unlink()
    assert trl_loop.newest(tmp_path, IDENTITY) == (old, {"step": 9})


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, data="other")
    with pytest.raises(ValueError, match="belongs to data other, this run has d; delete it"):
        trl_loop.newest(tmp_path, IDENTITY)


def test_options_that_are_not_for_trainers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile=True is not for"):
        trl_loop.require_options(dataclasses.replace(DEFAULTS, compile=True))
    with pytest.raises(ValueError, match="parallel='fsdp2' is not for"):
        trl_loop.require_options(dataclasses.replace(DEFAULTS, parallel="fsdp2"))
    config, team = STUDIES["sft"].small(), Team.here("ddp", "cpu", 2)
    with pytest.raises(ValueError, match="micro_batch=3 must divide 2"):
        trl_loop.arguments(config, dataclasses.replace(DEFAULTS, micro_batch=3), team, tmp_path)
    given = trl_loop.arguments(config, dataclasses.replace(DEFAULTS, micro_batch=1), team, tmp_path)
    assert (given["per_device_train_batch_size"], given["gradient_accumulation_steps"]) == (1, 2)


def test_a_schedule_at_a_peak_of_one_gives_the_runs_learning_rates() -> None:
    config = dataclasses.replace(STUDIES["sft"].base(), lr=3e-5, steps=30)
    at_peak_one = dataclasses.replace(config, lr=1.0)
    for step in range(30):
        assert config.lr * learning_rate(at_peak_one, step) == learning_rate(config, step)
