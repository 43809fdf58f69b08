"""Fine-tuning and reward models in TRL's trainers, at reduced width: they finish, resume, and refuse bad input.

Run with the libraries of the workloads: see ``make check-workloads``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.configs import TrainConfig
from experiments.data.instructions import instructions
from experiments.grids import STUDIES
from experiments.train import DEFAULTS, Refused, fetch, run_folder, train
from experiments.workloads import WORKLOADS, FineTuning, RewardModel, trl_loop
from experiments.workloads.bases import load_base
from experiments.workloads.libraries import library
from experiments.workloads.reward import Judging, chat
from experiments.workloads.sft import IGNORED, Instructing, adapted, tokenised
from experiments.workloads.trained_reward import trained_reward_model
from optimizer.tools.explain import explanation

NAMES = ("sft", "sft_lora", "reward")


def small(name: str, **fields: Any) -> TrainConfig:
    fields = {"experiment": name, "arm": "adam_mini", "lr": 1e-3, "steps": 4, "eval_every": 2, **fields}
    return dataclasses.replace(STUDIES[name].small(), **fields)


def lesson(config: TrainConfig) -> Any:
    return (Judging if isinstance(config.model, RewardModel) else Instructing)(config, config.model)


@pytest.mark.parametrize("name", NAMES)
def check_smoke_run_learns_and_leaves_its_files(name: str, tmp_path: Path) -> None:
    config = small(name, steps=8, lr=3e-3)
    ending = train(config, tmp_path)
    folder = run_folder(tmp_path, config.with_rules_hash())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ending["state"] == "finished" and [r["step"] for r in records] == [2, 4, 6, 8]
    assert records[-1]["train_loss"] < records[0]["train_loss"] or name == "reward"
    assert ending["second_moment_scalars"] < ending["parameters"]
    files = {path.name for path in folder.iterdir()}
    artefact = "calibration.json" if name == "reward" else "samples.json"
    assert files == {"config.json", "environment.json", "metrics.jsonl", "status.json", artefact}
    assert "transformers" in json.loads((folder / "environment.json").read_text())
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())) == config.with_rules_hash()


@pytest.mark.parametrize("name", NAMES)
def check_a_stopped_run_resumes_to_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(name, seed=3)
    whole = train(config, tmp_path / "whole")
    stop_after(2, monkeypatch)
    stopped = train(config, tmp_path / "parts")
    assert stopped["state"] == "interrupted" and stopped["signal"] == signal.SIGTERM and stopped["steps"] == 2
    monkeypatch.undo()
    resumed = train(config, tmp_path / "parts")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    lines = [run_folder(tmp_path / part, config.with_rules_hash()) / "metrics.jsonl" for part in ("whole", "parts")]
    first, second = ([json.loads(x) for x in path.read_text().splitlines()] for path in lines)
    assert [(r["step"], r["val_loss"], r["lr"]) for r in first] == [(r["step"], r["val_loss"], r["lr"]) for r in second]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the process SIGTERM when a run has taken some steps."""
    own = trl_loop.TrainerLoop.after_step

    def stopping(self: trl_loop.TrainerLoop, number: int, loss: float, seconds: float) -> tuple[bool, bool]:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, number, loss, seconds)

    monkeypatch.setattr(trl_loop.TrainerLoop, "after_step", stopping)


def check_a_kill_during_a_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("sft", checkpoint_every=1, seed=4)
    whole = train(config, tmp_path / "whole")
    transformers = library("transformers", "this check")
    own = transformers.Trainer._save_rng_state

    def killed(self: Any, folder: str) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt  # The weights and the optimizer are written, the trainer's state is not.
        own(self, folder)

    monkeypatch.setattr(transformers.Trainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    folder = run_folder(tmp_path / "parts", config.with_rules_hash()) / "checkpoints"
    assert (folder / "checkpoint-3").is_dir() and not (folder / "checkpoint-3" / trl_loop.MANIFEST).exists()
    identity = {"config": config.with_rules_hash().hash, "data": whole["data_fingerprint"]}
    found, progress = trl_loop.newest(folder, identity)
    assert found == folder / "checkpoint-2" and progress["step"] == 2
    monkeypatch.undo()
    assert train(config, tmp_path / "parts")["weights_sha256"] == whole["weights_sha256"]


def check_weights_that_are_no_numbers_end_a_run_as_diverged(tmp_path: Path) -> None:
    config = small("sft", arm="elementwise", lr=1e30, clip=0.0)
    assert train(config, tmp_path)["state"] == "diverged"
    assert not (run_folder(tmp_path, config.with_rules_hash()) / "checkpoints").exists()


def check_every_arm_sees_the_same_rows(tmp_path: Path) -> None:
    rows = []
    for arm in ("elementwise", "adam_mini"):
        config = small("sft", arm=arm, seed=5).with_rules_hash()
        rows.append(trl_loop.TrainerLoop(config, tmp_path / arm, DEFAULTS, None, lesson(config)).rows)  # type: ignore[arg-type]
    assert rows[0] == rows[1] and len(rows[0]) == 8
    other = small("sft", seed=6).with_rules_hash()
    assert trl_loop.TrainerLoop(other, tmp_path / "o", DEFAULTS, None, lesson(other)).rows != rows[0]  # type: ignore[arg-type]


def check_packed_rows_do_not_attend_to_each_other() -> None:
    """The second row's logits are those that it has alone, whatever row is before it."""
    trl = library("trl", "this check")
    base = load_base("smollm2", 64, seed=0)
    collate = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)
    first, other, second = list(range(10, 30)), list(range(40, 60)), list(range(70, 90))
    logits = []
    for before in (first, other):
        batch = collate([{"input_ids": before + second, "labels": before + second, "seq_lengths": [20, 20]}])
        assert batch["position_ids"].tolist() == [[*range(20), *range(20)]] and "attention_mask" not in batch
        batch.pop("labels")
        with torch.no_grad():
            logits.append(base.model(**batch, use_cache=False).logits[0, 20:])
    with torch.no_grad():
        alone = base.model(input_ids=torch.tensor([second])).logits[0]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    torch.testing.assert_close(logits[0], alone)


def check_labels_are_those_of_trl() -> None:
    """What is tokenised here is what TRL makes of the same conversations."""
    trl, datasets = library("trl", "this check"), library("datasets", "this check")
    config = small("sft")
    base = load_base("smollm2", 64, seed=0)
    rows = instructions()[0][:4]
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.question}],
                "completion": [{"role": "assistant", "content": row.answer}],
            }
            for row in rows
        ]
    )
    args = trl.SFTConfig("out/unused", max_length=4096, use_cpu=True, bf16=False, report_to="none")
    theirs = trl.SFTTrainer(base.model, args, train_dataset=data, processing_class=base.tokenizer).train_dataset
    ours = tokenised(rows, base.tokenizer, 4096)
    assert [row["input_ids"] for row in ours] == list(theirs["input_ids"])
    assert [row["labels"] for row in ours] == list(theirs["labels"])
    assert all(any(label != IGNORED for label in row["labels"]) for row in ours) and config.seq_len == 128


def check_pairs_end_with_a_token_that_is_no_padding() -> None:
    """The head reads the last token that is no padding, so an answer must not end with the padding token."""
    tokenizer = load_base("smollm2", 64, seed=0, scalar=True).tokenizer
    assert tokenizer.pad_token_id in (tokens := chat(tokenizer, "Good."))
    assert tokens[-1] != tokenizer.pad_token_id


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("full", [False, True])
def check_every_weight_is_recognised(name: str, full: bool) -> None:
    workload = WORKLOADS[name]
    model: Any = workload.full["llama-2-7b"]["model"] if full else workload.run["model"]
    scalar = isinstance(model, RewardModel)
    base = load_base(model.base, 64, seed=0, scalar=scalar).model
    built = base if scalar else adapted(base, dataclasses.replace(model, lora_rank=min(model.lora_rank, 4)), 0)
    rows = explanation(built).rows
    assert all(row.recognised for row in rows)
    roles = {role for row in rows for role in row.roles}
    expected = {"TOKEN_EMBEDDING", "QUERY", "KEY", "VALUE", "ATTENTION_OUT", "MLP_IN", "MLP_OUT", "NORM"}
    heads = {"HEAD"} if scalar or model.base == "llama-2-7b" else set()  # SmolLM2's output layer is its embedding
    assert roles == expected | heads | ({"LORA_A", "LORA_B"} if getattr(model, "lora_rank", 0) else set())


@pytest.mark.parametrize("name", NAMES)
def check_the_full_size_runs_two_steps_at_reduced_width(name: str, tmp_path: Path) -> None:
    """The settings of Llama 2-7B, on little data: 2 of its steps at width 64 and 128 tokens per row."""
    workload = WORKLOADS[name]
    fields = {**workload.run, **workload.full["llama-2-7b"]}
    with pytest.raises(FileNotFoundError, match="data='ultrafeedback' needs"):
        fetch(TrainConfig(f"{name}_full", **fields))
    rank = {"lora_rank": 4} if getattr(fields["model"], "lora_rank", 0) else {}
    less = {"data": workload.run["data"], "batch": 4, "seq_len": 128, "steps": 2, "eval_batches": 1, "warmup": 0.0}
    less["model"] = dataclasses.replace(fields["model"], width=64, **rank)
    ending = train(TrainConfig(f"{name}_full", **{**fields, **less}), tmp_path)
    assert ending["state"] == "finished" and math.isfinite(ending["final_val_loss"])


def check_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seq_len=20 leaves no row"):
        fetch_and_train(small("sft", seq_len=20), tmp_path)
    with pytest.raises(ValueError, match="seq_len=20 leaves none of"):
        fetch_and_train(small("reward", seq_len=20), tmp_path)
    with pytest.raises(ValueError, match="seq_len=10000 must be at most 8192, the model's context"):
        fetch_and_train(small("sft", seq_len=10_000), tmp_path)
    with pytest.raises(ValueError, match="is no set of instructions"):
        fetch_and_train(small("sft", data="enwik8"), tmp_path)
    with pytest.raises(ValueError, match="is no set of ratings"):
        fetch_and_train(small("reward", data="enwik8"), tmp_path)
    with pytest.raises(ValueError, match="batch=9999 must be at most"):
        fetch_and_train(small("sft", batch=9999), tmp_path)
    with pytest.raises(ValueError, match="compile=True is not for"):
        train(small("sft"), tmp_path, dataclasses.replace(DEFAULTS, compile=True))
    with pytest.raises(FileNotFoundError, match="Llama-2-7b-hf"):
        fetch(small("sft", model=FineTuning("llama-2-7b")))


def fetch_and_train(config: TrainConfig, root: Path) -> None:
    fetch(config)
    with pytest.raises(Refused):
        train(config, root)
    train(config, root)


def check_a_trained_reward_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base("smollm2", 64, seed=0)  # the pinned files of the real cache folder
    config = small("reward", seed=0, arm="elementwise").with_rules_hash()
    made = trained_at(tmp_path, config, monkeypatch)
    again = trained_at(tmp_path, config, monkeypatch)
    assert made.fingerprint == again.fingerprint
    scores = made.score(["What a lovely day!", "This is awful.", "word " * 300])
    assert scores.shape == (3,) and torch.equal(
        scores, again.score(["What a lovely day!", "This is awful.", "word " * 300])
    )
    torch.testing.assert_close(scores[:1], made.score([" What a lovely day! "]))  # another batch rounds differently
    weights = next(tmp_path.rglob("model.safetensors"))
    weights.write_bytes(b"other")
    with pytest.raises(RuntimeError, match="has sha256"):
        trained_at(tmp_path, config, monkeypatch)


def check_a_signal_stops_the_training_of_the_reward_model_and_the_next_call_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base("smollm2", 64, seed=0)
    config = small("reward", seed=0, arm="elementwise").with_rules_hash()
    whole = trained_at(tmp_path / "whole", config, monkeypatch)
    evaluate = Judging.evaluate

    def stopped(self: Judging, **options: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return evaluate(self, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Judging, "evaluate", stopped)
        trained_at(tmp_path / "cut", config, monkeypatch)
    assert ended.value.code == 130
    assert trained_at(tmp_path / "cut", config, monkeypatch).fingerprint == whole.fingerprint


def trained_at(folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    trained_reward_model.cache_clear()
    monkeypatch.setattr("experiments.workloads.trained_reward.cache_folder", lambda: folder)
    return trained_reward_model(config)
